#include "bind/functions.h"

namespace chainfed::bind {

void bind_head(pybind11::module_&) {}

}  // namespace chainfed::bind

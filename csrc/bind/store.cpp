#include "bind/functions.h"

namespace chainfed::bind {

void bind_store(pybind11::module_&) {}

}  // namespace chainfed::bind

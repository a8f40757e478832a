#include "bind/functions.h"

namespace chainfed::bind {

void bind_boundary(pybind11::module_&) {}

}  // namespace chainfed::bind

#include "bind/functions.h"

namespace chainfed::bind {

void bind_gemm(pybind11::module_&) {}

}  // namespace chainfed::bind

// The Python module `_native`: nothing but the order of registration.
#include <pybind11/pybind11.h>

#include "bind/functions.h"

PYBIND11_MODULE(_native, module) {
  module.doc() = "The compiled core of chainfed_engine; its contract stands in _native.pyi.";
  module.attr("__version__") = CHAINFED_VERSION;
  chainfed::bind::register_errors();
  chainfed::bind::bind_runtime(module);
  chainfed::bind::bind_quant(module);
  chainfed::bind::bind_gemm(module);
  chainfed::bind::bind_head(module);
  chainfed::bind::bind_boundary(module);
  chainfed::bind::bind_cuda(module);
  chainfed::bind::bind_store(module);
}

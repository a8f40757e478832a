// One function a part of the core, each in bind/<part>.cpp, called by module.cpp.
#pragma once
#include <pybind11/pybind11.h>

namespace chainfed::bind {

void register_errors();
void bind_runtime(pybind11::module_& module);
void bind_quant(pybind11::module_& module);  // also Matrix
void bind_gemm(pybind11::module_& module);
void bind_head(pybind11::module_& module);
void bind_boundary(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);
void bind_store(pybind11::module_& module);

}  // namespace chainfed::bind

// The quantised linear: forward and grad-input.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bind/activation.h"
#include "bind/array.h"
#include "bind/cuda.h"
#include "bind/functions.h"
#include "bind/matrix.h"
#include "chainfed/error.h"
#include "chainfed/kernels.h"

namespace chainfed::bind {
namespace {

using WorkspaceBytes = int64_t (*)(BlockFormat, int64_t, int64_t, int64_t);

int64_t workspace_bytes(const char* function, cuda::Direction direction, int place, BlockFormat format,
                        int64_t num_tokens, int64_t num_rows, int64_t num_cols) {
  if (place == kOnCpu) {
    const bool is_forward = direction == cuda::Direction::forward;
    const WorkspaceBytes bytes = is_forward ? &linear_forward_workspace_bytes : &linear_grad_input_workspace_bytes;
    return bytes(format, num_tokens, num_rows, num_cols);
  }
  int64_t bytes = 0;
  call_cuda(function, [&](const cuda::Table& table, cuda::Message* message) {
    return table.linear_workspace_bytes(place, format, direction, num_tokens, num_rows, num_cols, &bytes, message);
  });
  return bytes;
}

void run_on_cuda(const Arguments& args, void* stream, const cuda::LinearCall& call, void* workspace) {
  call_cuda(args.function(), [&](const cuda::Table& table, cuda::Message* message) {
    return table.linear(args.place(), stream, &call, workspace, message);
  });
}

cuda::Precision precision_of(Activation activation) {
  return activation == Activation::f32 ? cuda::Precision::exact : cuda::Precision::fast;
}

void forward(const Matrix& matrix, py::handle x_object, py::handle bias_object, const std::string& activation_name,
             py::handle out_object, py::handle workspace_object, uintptr_t stream_handle) {
  Arguments args("linear_forward", Arguments::Devices::any);
  const MatrixView& w = matrix.view(args);
  const Activation activation = parse_activation(args, activation_name);
  const Array& x = args.input("x", x_object, Dtype::f32, {kAny, w.num_cols});
  const Array& bias = args.optional_input("bias", bias_object, Dtype::f32, {w.num_rows});
  const Array& out = args.output("out", out_object, Dtype::f32, {x.size(0), w.num_rows});
  void* stream = args.stream(stream_handle);
  const Array& workspace =
      args.workspace(workspace_object, workspace_bytes(args.function(), cuda::Direction::forward, args.place(),
                                                       w.format, x.size(0), w.num_rows, w.num_cols));
  args.check_aliases();
  // `args` and the caller's reference to `matrix` keep all memory alive while the GIL is released.
  py::gil_scoped_release nogil;
  if (args.on_cuda()) {
    run_on_cuda(args, stream,
                {w, cuda::Direction::forward, precision_of(activation), x.as<float>(), x.size(0), bias.as<float>(),
                 out.mutable_as<float>(), false},
                workspace.mutable_data());
    return;
  }
  linear_forward(w, x.as<float>(), x.size(0), bias.as<float>(), activation, out.mutable_as<float>(),
                 workspace.mutable_data());
}

void grad_input(const Matrix& matrix, py::handle grad_object, const std::string& activation_name, py::handle out_object,
                py::handle workspace_object, uintptr_t stream_handle) {
  Arguments args("linear_grad_input", Arguments::Devices::any);
  const MatrixView& w = matrix.view(args);
  const Activation activation = parse_activation(args, activation_name);
  const Array& grad_out = args.input("grad_out", grad_object, Dtype::f32, {kAny, w.num_rows});
  const Array& out = args.output("out", out_object, Dtype::f32, {grad_out.size(0), w.num_cols});
  void* stream = args.stream(stream_handle);
  const Array& workspace =
      args.workspace(workspace_object, workspace_bytes(args.function(), cuda::Direction::grad, args.place(), w.format,
                                                       grad_out.size(0), w.num_rows, w.num_cols));
  args.check_aliases();
  py::gil_scoped_release nogil;
  if (args.on_cuda()) {
    run_on_cuda(args, stream,
                {w, cuda::Direction::grad, precision_of(activation), grad_out.as<float>(), grad_out.size(0), nullptr,
                 out.mutable_as<float>(), false},
                workspace.mutable_data());
    return;
  }
  linear_grad_input(w, grad_out.as<float>(), grad_out.size(0), out.mutable_as<float>(), workspace.mutable_data());
}

void bind_workspace_bytes(py::module_& module, const char* name, cuda::Direction direction) {
  module.def(
      name,
      [name, direction](const std::string& block_format, int64_t num_tokens, int64_t num_rows, int64_t num_cols,
                        const std::optional<int>& device) {
        if (num_tokens < 0 || num_rows < 1 || num_cols < 1) {
          throw InvalidArgument(std::string(name) + ": needs num_tokens >= 0, num_rows >= 1 and num_cols >= 1");
        }
        return workspace_bytes(name, direction, place_of_device(name, device), parse_block_format(block_format.c_str()),
                               num_tokens, num_rows, num_cols);
      },
      py::arg("block_format"), py::arg("num_tokens"), py::arg("num_rows"), py::arg("num_cols"),
      py::arg("device") = py::none());
}

}  // namespace

void bind_gemm(py::module_& module) {
  module.def("linear_forward", &forward, py::arg("matrix"), py::arg("x"), py::arg("bias").none(true), py::kw_only(),
             py::arg("activation"), py::arg("out"), py::arg("workspace"), py::arg("stream") = 0);
  module.def("linear_grad_input", &grad_input, py::arg("matrix"), py::arg("grad_out"), py::kw_only(),
             py::arg("activation") = "f32", py::arg("out"), py::arg("workspace"), py::arg("stream") = 0);
  bind_workspace_bytes(module, "linear_forward_workspace_bytes", cuda::Direction::forward);
  bind_workspace_bytes(module, "linear_grad_input_workspace_bytes", cuda::Direction::grad);
}

}  // namespace chainfed::bind

// Cross-entropy against a frozen head: shapes follow from shard and hidden; everything the kernels accumulate into is
// the caller's and is checked like an output.
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

// grad and target_row come together: one is the sum over the vocabulary, the other the target's own row.
void require_both_or_none(const Arguments& args, const Array& grad, const Array& target_row) {
  if (grad.is_null() != target_row.is_null()) args.fail("grad and target_row must be given both or neither");
}

// That a target lies in some shard is for the caller, who alone knows the vocabulary; a label to be ignored (-100) lies
// in none and would silently give a wrong loss.
// On a device they are not read here: such a token gets a wrong loss and disturbs no other.
void check_targets(const Arguments& args, const Array& targets) {
  if (args.on_cuda()) return;
  for (int64_t t = 0; t < targets.size(0); ++t) {
    const int64_t target = targets.as<int64_t>()[t];
    if (target < 0) {
      args.fail("targets must be vocabulary rows (leave tokens without a label out), got " + std::to_string(target) +
                " at position " + std::to_string(t));
    }
  }
}

int64_t head_workspace_bytes(const char* function, int place, BlockFormat format, int64_t num_tokens, int64_t num_rows,
                             int64_t hidden_size) {
  if (place == kOnCpu) return cross_entropy_workspace_bytes(format, num_tokens, num_rows, hidden_size);
  int64_t bytes = 0;
  call_cuda(function, [&](const cuda::Table& table, cuda::Message* message) {
    return table.cross_entropy_workspace_bytes(place, format, num_tokens, num_rows, hidden_size, &bytes, message);
  });
  return bytes;
}

void update(const Matrix& shard, int64_t first_row, py::handle hidden_object, py::handle targets_object,
            const std::string& activation_name, py::handle max_object, py::handle sum_object,
            py::handle target_logit_object, py::handle grad_object, py::handle target_row_object,
            py::handle workspace_object, uintptr_t stream_handle) {
  Arguments args("cross_entropy_update", Arguments::Devices::any);
  const MatrixView& view = shard.view(args);
  const Activation activation = parse_activation(args, activation_name);
  if (first_row < 0 || first_row > INT64_MAX - view.num_rows) {
    args.fail("first_row must be the number of the shard's first vocabulary row, got " + std::to_string(first_row));
  }
  const Array& hidden = args.input("hidden", hidden_object, Dtype::f32, {kAny, view.num_cols});
  const int64_t num_tokens = hidden.size(0), hidden_size = hidden.size(1);
  const Array& targets = args.input("targets", targets_object, Dtype::i64, {num_tokens});
  const Array& running_max = args.output("running_max", max_object, Dtype::f32, {num_tokens});
  const Array& running_sum = args.output("running_sum", sum_object, Dtype::f32, {num_tokens});
  const Array& target_logit = args.output("target_logit", target_logit_object, Dtype::f32, {num_tokens});
  const Array& grad = args.optional_output("grad", grad_object, Dtype::f32, {num_tokens, hidden_size});
  const Array& target_row =
      args.optional_output("target_row", target_row_object, Dtype::f32, {num_tokens, hidden_size});
  require_both_or_none(args, grad, target_row);
  check_targets(args, targets);
  void* stream = args.stream(stream_handle);
  const Array& workspace = args.workspace(
      workspace_object,
      head_workspace_bytes(args.function(), args.place(), view.format, num_tokens, view.num_rows, hidden_size));
  args.check_aliases();
  py::gil_scoped_release nogil;
  if (args.on_cuda()) {
    const cuda::CrossEntropyCall call{view,
                                      first_row,
                                      hidden.as<float>(),
                                      targets.as<int64_t>(),
                                      num_tokens,
                                      activation == Activation::f32 ? cuda::Precision::exact : cuda::Precision::fast,
                                      running_max.mutable_as<float>(),
                                      running_sum.mutable_as<float>(),
                                      target_logit.mutable_as<float>(),
                                      grad.mutable_as<float>(),
                                      target_row.mutable_as<float>()};
    call_cuda(args.function(), [&](const cuda::Table& table, cuda::Message* message) {
      return table.cross_entropy_update(args.place(), stream, &call, workspace.mutable_data(), message);
    });
    return;
  }
  cross_entropy_update(view, first_row, hidden.as<float>(), targets.as<int64_t>(), num_tokens, activation,
                       running_max.mutable_as<float>(), running_sum.mutable_as<float>(),
                       target_logit.mutable_as<float>(), grad.mutable_as<float>(), target_row.mutable_as<float>(),
                       workspace.mutable_data());
}

void finish(py::handle max_object, py::handle sum_object, py::handle target_logit_object,
            py::handle token_weight_object, py::handle loss_object, py::handle grad_object,
            py::handle target_row_object, uintptr_t stream_handle) {
  Arguments args("cross_entropy_finish", Arguments::Devices::any);
  const Array& running_max = args.input("running_max", max_object, Dtype::f32, {kAny});
  const int64_t num_tokens = running_max.size(0);
  const Array& running_sum = args.input("running_sum", sum_object, Dtype::f32, {num_tokens});
  const Array& target_logit = args.input("target_logit", target_logit_object, Dtype::f32, {num_tokens});
  const Array& token_weight = args.optional_input("token_weight", token_weight_object, Dtype::f32, {num_tokens});
  const Array& loss = args.output("loss_out", loss_object, Dtype::f32, {num_tokens});
  const Array& grad = args.optional_output("grad", grad_object, Dtype::f32, {num_tokens, kAny});
  const int64_t hidden_size = grad.is_null() ? 0 : grad.size(1);
  const Array& target_row = args.optional_input("target_row", target_row_object, Dtype::f32,
                                                {num_tokens, grad.is_null() ? kAny : hidden_size});
  require_both_or_none(args, grad, target_row);
  void* stream = args.stream(stream_handle);
  args.check_aliases();
  py::gil_scoped_release nogil;
  if (args.on_cuda()) {
    const cuda::FinishCall call{num_tokens,
                                hidden_size,
                                running_max.as<float>(),
                                running_sum.as<float>(),
                                target_logit.as<float>(),
                                token_weight.as<float>(),
                                loss.mutable_as<float>(),
                                grad.mutable_as<float>(),
                                target_row.as<float>()};
    call_cuda(args.function(), [&](const cuda::Table& table, cuda::Message* message) {
      return table.cross_entropy_finish(args.place(), stream, &call, message);
    });
    return;
  }
  cross_entropy_finish(num_tokens, hidden_size, running_max.as<float>(), running_sum.as<float>(),
                       target_logit.as<float>(), token_weight.as<float>(), loss.mutable_as<float>(),
                       grad.mutable_as<float>(), target_row.as<float>());
}

int64_t workspace_bytes(const std::string& block_format, int64_t num_tokens, int64_t num_rows, int64_t hidden_size,
                        const std::optional<int>& device) {
  constexpr const char* kName = "cross_entropy_workspace_bytes";
  if (num_tokens < 0 || num_rows < 1 || hidden_size < 1) {
    throw InvalidArgument(
        "cross_entropy_workspace_bytes: num_tokens must be >= 0, num_rows and hidden_size >= 1, got " +
        std::to_string(num_tokens) + ", " + std::to_string(num_rows) + " and " + std::to_string(hidden_size));
  }
  return head_workspace_bytes(kName, place_of_device(kName, device), parse_block_format(block_format.c_str()),
                              num_tokens, num_rows, hidden_size);
}

}  // namespace

void bind_head(py::module_& module) {
  module.def("cross_entropy_update", &update, py::arg("shard"), py::arg("first_row"), py::arg("hidden"),
             py::arg("targets"), py::kw_only(), py::arg("activation"), py::arg("running_max"), py::arg("running_sum"),
             py::arg("target_logit"), py::arg("grad").none(true), py::arg("target_row").none(true),
             py::arg("workspace"), py::arg("stream") = 0);
  module.def("cross_entropy_finish", &finish, py::kw_only(), py::arg("running_max"), py::arg("running_sum"),
             py::arg("target_logit"), py::arg("token_weight").none(true), py::arg("loss_out"),
             py::arg("grad").none(true), py::arg("target_row").none(true), py::arg("stream") = 0);
  module.def("cross_entropy_workspace_bytes", &workspace_bytes, py::arg("block_format"), py::arg("num_tokens"),
             py::arg("num_rows"), py::arg("hidden_size"), py::arg("device") = py::none());
}

}  // namespace chainfed::bind

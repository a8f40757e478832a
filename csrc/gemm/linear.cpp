#include "gemm/linear.h"

#include <algorithm>

#include "chainfed/kernels.h"
#include "gemm/f32_gemm.h"
#include "gemm/int8_gemm.h"

namespace chainfed {
namespace {

static_assert(kMaxPackedTokens <= kInt8ChunkTokens, "packed rows are one chunk");

bool is_tiled(BlockFormat format) { return format != BlockFormat::bf16 && format != BlockFormat::f32; }

}  // namespace

void linear_forward(const MatrixView& w, const float* x, int64_t num_tokens, const float* bias, Activation activation,
                    float* out, void* workspace) {
  if (num_tokens == 0) return;
  if (activation == Activation::int8 && is_tiled(w.format)) {
    int8_forward(w, x, num_tokens, bias, out, workspace);
  } else {
    f32_forward(w, x, num_tokens, bias, out, workspace);
  }
}

void linear_pack(const MatrixView& w, const float* x, int64_t num_tokens, Activation activation, void* workspace) {
  if (activation == Activation::int8 && is_tiled(w.format)) int8_pack(w, x, num_tokens, workspace);
}

void linear_forward_packed(const MatrixView& w, const float* x, int64_t num_tokens, Activation activation, float* out,
                           void* workspace) {
  if (activation == Activation::int8 && is_tiled(w.format)) {
    int8_forward_packed(w, num_tokens, nullptr, out, workspace);
  } else {
    f32_forward(w, x, num_tokens, nullptr, out, workspace);
  }
}

void linear_grad_input(const MatrixView& w, const float* grad_out, int64_t num_tokens, float* out, void* workspace) {
  if (num_tokens > 0) f32_grad_input(w, grad_out, num_tokens, false, out, workspace);
}

void linear_grad_input_add(const MatrixView& w, const float* grad_out, int64_t num_tokens, float* out,
                           void* workspace) {
  if (num_tokens > 0) f32_grad_input(w, grad_out, num_tokens, true, out, workspace);
}

int64_t linear_forward_workspace_bytes(BlockFormat format, int64_t num_tokens, int64_t num_rows, int64_t num_cols) {
  (void)num_rows;
  if (num_tokens <= 0) return 0;
  const int64_t exact = f32_workspace_bytes(num_tokens, num_cols);
  return is_tiled(format) ? std::max(exact, int8_workspace_bytes(format, num_tokens, num_cols)) : exact;
}

int64_t linear_grad_input_workspace_bytes(BlockFormat format, int64_t num_tokens, int64_t num_rows, int64_t num_cols) {
  (void)format, (void)num_cols;
  return num_tokens <= 0 ? 0 : f32_workspace_bytes(num_tokens, num_rows);
}

}  // namespace chainfed

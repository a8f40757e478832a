// Beside chainfed/kernels.h: grad-input added to `out`, and the forward product in two steps for several matrices.
#pragma once
#include <cstdint>

#include "chainfed/kernels.h"

namespace chainfed {

// out += grad_out W; workspace as linear_grad_input.
void linear_grad_input_add(const MatrixView& w, const float* grad_out /*[M,N]*/, int64_t num_tokens,
                           float* out /*[M,K]*/, void* workspace);

// linear_forward of the same few rows x [M,K] with several matrices of one format and width (rows of one vocabulary):
// linear_pack quantises the rows once and leaves them in the workspace, linear_forward_packed multiplies.
constexpr int64_t kMaxPackedTokens = 256;
void linear_pack(const MatrixView& w, const float* x, int64_t num_tokens, Activation activation, void* workspace);
void linear_forward_packed(const MatrixView& w, const float* x, int64_t num_tokens, Activation activation,
                           float* out /*[M,N]*/, void* workspace);

}  // namespace chainfed

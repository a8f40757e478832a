// Beside chainfed/kernels.h: the same grad-input, added to `out` instead of stored.
#pragma once
#include <cstdint>

#include "chainfed/block_format.h"

namespace chainfed {

// out += grad_out W; workspace as linear_grad_input.
void linear_grad_input_add(const MatrixView& w, const float* grad_out /*[M,N]*/, int64_t num_tokens,
                           float* out /*[M,K]*/, void* workspace);

}  // namespace chainfed

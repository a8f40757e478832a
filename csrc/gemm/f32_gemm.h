// The f32 matrix product behind exact forward and grad-input: C [M, P] (+)= A [M, Q] B [Q, P], where B is decoded from
// a frozen matrix, one panel of 256 x 32 (32 KiB) at a time, into the stack of the thread that multiplies it.
//   forward     A = x,        Q = K in features,  P = N out features,  B[q][p] = W[p][q]
//   grad-input  A = grad_out, Q = N out features, P = K in features,   B[q][p] = W[q][p]
// Q is cut into blocks of 256 and each element of C adds up its products in order of q inside a block, then the blocks
// in order: a row's result depends on neither M nor the number of threads.
#pragma once
#include <cstdint>

#include "chainfed/block_format.h"

namespace chainfed {

constexpr int64_t kGemmDepth = 256;        // q in a block
constexpr int64_t kGemmPanelCols = 32;     // p in a panel
constexpr int64_t kGemmMaxRows = 384;      // rows of A packed at a time
constexpr int64_t kGemmMaxMicroRows = 12;  // the tallest micro-kernel of any SIMD level

// One micro-kernel a SIMD level: micro_rows x micro_cols of C in registers.
struct F32Kernels {
  int64_t micro_rows, micro_cols;  // micro_cols 16 or 32: half a tile or a tile
  // packed[q * micro_rows + i] = a[i * row_stride + q], zero for i >= num_rows.
  void (*pack)(const float* a, int64_t row_stride, int64_t num_rows, int64_t depth, float* packed);
  // c[i * row_stride + p] = start[p] + sum over q of packed[q * micro_rows + i] * panel[q * micro_cols + p];
  // start null: added to c.
  void (*multiply)(const float* packed, const float* panel, int64_t depth, int64_t num_rows, const float* start,
                   float* c, int64_t row_stride);
};
extern const F32Kernels kF32KernelsScalar, kF32KernelsAvx2, kF32KernelsAvx512, kF32KernelsNeon;

// add: C += A B instead of C = A B. bias [N] or null, forward only.
void f32_forward(const MatrixView& w, const float* x, int64_t num_tokens, const float* bias, float* out,
                 void* workspace);
void f32_grad_input(const MatrixView& w, const float* grad_out, int64_t num_tokens, bool add, float* out,
                    void* workspace);
int64_t f32_workspace_bytes(int64_t num_tokens, int64_t depth);

}  // namespace chainfed

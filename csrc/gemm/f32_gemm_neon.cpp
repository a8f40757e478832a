// 6 x 16: twenty-four accumulators, four vectors of the panel, A by broadcast.
#include <arm_neon.h>

#include "gemm/f32_gemm.h"

namespace chainfed {
namespace {

constexpr int64_t kRows = 6, kCols = 16;

void pack(const float* a, int64_t row_stride, int64_t num_rows, int64_t depth, float* packed) {
  if (num_rows == kRows) {
    for (int64_t q = 0; q < depth; ++q) {
      for (int64_t i = 0; i < kRows; ++i) packed[q * kRows + i] = a[i * row_stride + q];
    }
    return;
  }
  for (int64_t q = 0; q < depth; ++q) {
    for (int64_t i = 0; i < kRows; ++i) packed[q * kRows + i] = i < num_rows ? a[i * row_stride + q] : 0.0f;
  }
}

template <int Rows>
void multiply_rows(const float* packed, const float* panel, int64_t depth, const float* start, float* c,
                   int64_t row_stride) {
  float32x4_t sum[Rows][4];
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = vdupq_n_f32(0.0f);
  for (int64_t q = 0; q < depth; ++q) {
    float32x4_t b[4];
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) b[p] = vld1q_f32(panel + 4 * p);
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) sum[i][p] = vfmaq_n_f32(sum[i][p], b[p], packed[i]);
    }
    packed += kRows;
    panel += kCols;
  }
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i) {
    float* target = c + i * row_stride;
    const float* base = start != nullptr ? start : target;
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) vst1q_f32(target + 4 * p, vaddq_f32(vld1q_f32(base + 4 * p), sum[i][p]));
  }
}

using Multiply = void (*)(const float*, const float*, int64_t, const float*, float*, int64_t);
constexpr Multiply kMultiply[kRows] = {&multiply_rows<1>, &multiply_rows<2>, &multiply_rows<3>,
                                       &multiply_rows<4>, &multiply_rows<5>, &multiply_rows<6>};

void multiply(const float* packed, const float* panel, int64_t depth, int64_t num_rows, const float* start, float* c,
              int64_t row_stride) {
  kMultiply[num_rows - 1](packed, panel, depth, start, c, row_stride);
}

}  // namespace

const F32Kernels kF32KernelsNeon = {kRows, kCols, &pack, &multiply};

}  // namespace chainfed

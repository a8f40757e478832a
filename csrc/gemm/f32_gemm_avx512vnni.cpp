// 12 x 32: twenty-four accumulators, two vectors of the panel; A is broadcast inside the FMA.
#include <immintrin.h>

#include "base/transpose-inl.h"
#include "gemm/f32_gemm.h"

namespace chainfed {
namespace {

constexpr int64_t kRows = 12, kCols = 32;

void pack(const float* a, int64_t row_stride, int64_t num_rows, int64_t depth, float* packed) {
  int64_t q = 0;
  if (num_rows == kRows) {
    for (; q + 8 <= depth; q += 8) {
      __m256 low[8], high[8];
      for (int i = 0; i < 8; ++i) low[i] = _mm256_loadu_ps(a + i * row_stride + q);
      for (int i = 0; i < 4; ++i) high[i] = _mm256_loadu_ps(a + (8 + i) * row_stride + q);
      for (int i = 4; i < 8; ++i) high[i] = _mm256_setzero_ps();
      transpose_8x8(low);
      transpose_8x8(high);
      for (int k = 0; k < 8; ++k) {
        float* target = packed + (q + k) * kRows;
        _mm256_storeu_ps(target, low[k]);
        _mm_storeu_ps(target + 8, _mm256_castps256_ps128(high[k]));
      }
    }
  }
  for (; q < depth; ++q) {
    for (int64_t i = 0; i < kRows; ++i) packed[q * kRows + i] = i < num_rows ? a[i * row_stride + q] : 0.0f;
  }
}

template <int Rows>
void multiply_rows(const float* packed, const float* panel, int64_t depth, const float* start, float* c,
                   int64_t row_stride) {
  __m512 sum[Rows][2];
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (int64_t q = 0; q < depth; ++q) {
    const __m512 b0 = _mm512_load_ps(panel), b1 = _mm512_load_ps(panel + 16);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      const __m512 value = _mm512_set1_ps(packed[i]);
      sum[i][0] = _mm512_fmadd_ps(value, b0, sum[i][0]);
      sum[i][1] = _mm512_fmadd_ps(value, b1, sum[i][1]);
    }
    packed += kRows;
    panel += kCols;
  }
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
    float* target = c + i * row_stride;
    const float* base = start != nullptr ? start : target;
    _mm512_storeu_ps(target, _mm512_add_ps(_mm512_loadu_ps(base), sum[i][0]));
    _mm512_storeu_ps(target + 16, _mm512_add_ps(_mm512_loadu_ps(base + 16), sum[i][1]));
  }
}

using Multiply = void (*)(const float*, const float*, int64_t, const float*, float*, int64_t);
constexpr Multiply kMultiply[kRows] = {&multiply_rows<1>, &multiply_rows<2>,  &multiply_rows<3>,  &multiply_rows<4>,
                                       &multiply_rows<5>, &multiply_rows<6>,  &multiply_rows<7>,  &multiply_rows<8>,
                                       &multiply_rows<9>, &multiply_rows<10>, &multiply_rows<11>, &multiply_rows<12>};

void multiply(const float* packed, const float* panel, int64_t depth, int64_t num_rows, const float* start, float* c,
              int64_t row_stride) {
  kMultiply[num_rows - 1](packed, panel, depth, start, c, row_stride);
}

}  // namespace

const F32Kernels kF32KernelsAvx512 = {kRows, kCols, &pack, &multiply};

}  // namespace chainfed

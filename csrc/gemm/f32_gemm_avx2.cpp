// 6 x 16: twelve accumulators, two vectors of the panel, one broadcast of A; 12 FMA for 8 loads.
#include <immintrin.h>

#include "base/transpose-inl.h"
#include "gemm/f32_gemm.h"

namespace chainfed {
namespace {

constexpr int64_t kRows = 6, kCols = 16;

void pack(const float* a, int64_t row_stride, int64_t num_rows, int64_t depth, float* packed) {
  int64_t q = 0;
  if (num_rows == kRows) {
    for (; q + 8 <= depth; q += 8) {
      __m256 v[8];
      for (int i = 0; i < 6; ++i) v[i] = _mm256_loadu_ps(a + i * row_stride + q);
      v[6] = v[7] = _mm256_setzero_ps();
      transpose_8x8(v);
      for (int k = 0; k < 8; ++k) {
        float* target = packed + (q + k) * kRows;
        _mm_storeu_ps(target, _mm256_castps256_ps128(v[k]));
        _mm_storel_pi(reinterpret_cast<__m64*>(target + 4), _mm256_extractf128_ps(v[k], 1));
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
  __m256 sum[Rows][2];
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
  for (int64_t q = 0; q < depth; ++q) {
    const __m256 b0 = _mm256_load_ps(panel), b1 = _mm256_load_ps(panel + 8);
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) {
      const __m256 value = _mm256_broadcast_ss(packed + i);
      sum[i][0] = _mm256_fmadd_ps(value, b0, sum[i][0]);
      sum[i][1] = _mm256_fmadd_ps(value, b1, sum[i][1]);
    }
    packed += kRows;
    panel += kCols;
  }
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i) {
    float* target = c + i * row_stride;
    const float* base = start != nullptr ? start : target;
    _mm256_storeu_ps(target, _mm256_add_ps(_mm256_loadu_ps(base), sum[i][0]));
    _mm256_storeu_ps(target + 8, _mm256_add_ps(_mm256_loadu_ps(base + 8), sum[i][1]));
  }
}

void multiply(const float* packed, const float* panel, int64_t depth, int64_t num_rows, const float* start, float* c,
              int64_t row_stride) {
  switch (num_rows) {
    case 1:
      return multiply_rows<1>(packed, panel, depth, start, c, row_stride);
    case 2:
      return multiply_rows<2>(packed, panel, depth, start, c, row_stride);
    case 3:
      return multiply_rows<3>(packed, panel, depth, start, c, row_stride);
    case 4:
      return multiply_rows<4>(packed, panel, depth, start, c, row_stride);
    case 5:
      return multiply_rows<5>(packed, panel, depth, start, c, row_stride);
    default:
      return multiply_rows<6>(packed, panel, depth, start, c, row_stride);
  }
}

}  // namespace

const F32Kernels kF32KernelsAvx2 = {kRows, kCols, &pack, &multiply};

}  // namespace chainfed

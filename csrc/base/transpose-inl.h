// An 8 x 8 transpose in registers, for files compiled with AVX2 or more.
#pragma once
#include <immintrin.h>

namespace chainfed {
namespace {

inline void transpose_8x8(__m256 v[8]) {
  __m256 a[8], b[8];
  for (int p = 0; p < 4; ++p) {
    a[2 * p] = _mm256_unpacklo_ps(v[2 * p], v[2 * p + 1]);
    a[2 * p + 1] = _mm256_unpackhi_ps(v[2 * p], v[2 * p + 1]);
  }
  for (int q = 0; q < 2; ++q) {
    b[4 * q] = _mm256_shuffle_ps(a[4 * q], a[4 * q + 2], 0x44);
    b[4 * q + 1] = _mm256_shuffle_ps(a[4 * q], a[4 * q + 2], 0xEE);
    b[4 * q + 2] = _mm256_shuffle_ps(a[4 * q + 1], a[4 * q + 3], 0x44);
    b[4 * q + 3] = _mm256_shuffle_ps(a[4 * q + 1], a[4 * q + 3], 0xEE);
  }
  for (int p = 0; p < 4; ++p) {
    v[p] = _mm256_permute2f128_ps(b[p], b[p + 4], 0x20);
    v[p + 4] = _mm256_permute2f128_ps(b[p], b[p + 4], 0x31);
  }
}

}  // namespace
}  // namespace chainfed

#include "head/int16_cell.h"

#include <immintrin.h>

#include <cstring>

namespace chainfed {
namespace {

int32_t pair_of_weights(const Int16Cell& cell, int32_t pair, int64_t t) {
  int32_t both;
  std::memcpy(&both, cell.weight[pair][t], sizeof both);
  return both;
}

}  // namespace

void accumulate_int16_avx512vnni(const Int16Cell& cell, const Int16Panel& panel, float* const* grad) {
  __m512i left[kBlockTokens], right[kBlockTokens];
  for (int64_t t = 0; t < kBlockTokens; ++t) left[t] = right[t] = _mm512_setzero_si512();
  const auto add = [&](int32_t pair, __m512i low, __m512i high) {
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      const __m512i weight = _mm512_set1_epi32(pair_of_weights(cell, pair, t));
      left[t] = _mm512_dpwssd_epi32(left[t], weight, low);
      right[t] = _mm512_dpwssd_epi32(right[t], weight, high);
    }
  };
  if (cell.lists_all_rows()) {
    for (int32_t pair = 0; pair < cell.num_pairs; ++pair) {
      add(pair, _mm512_load_si512(panel.pair[pair]), _mm512_load_si512(panel.pair[pair][16]));
    }
  } else {
    for (int32_t pair = 0; pair < cell.num_pairs; ++pair) {
      const __m512i a = _mm512_load_si512(panel.value[cell.row[pair][0]]);
      const __m512i b = _mm512_load_si512(panel.value[cell.row[pair][1]]);
      add(pair, _mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b));
    }
  }
  const __m512 scale_left = _mm512_load_ps(panel.scale), scale_right = _mm512_load_ps(panel.scale + 16);
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    const __m512 scale = _mm512_set1_ps(cell.scale[t]);
    const __m512 g =
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(left[t]), _mm512_mul_ps(scale, scale_left), _mm512_loadu_ps(grad[t]));
    const __m512 h =
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(right[t]), _mm512_mul_ps(scale, scale_right), _mm512_loadu_ps(grad[t] + 16));
    _mm512_storeu_ps(grad[t], g);
    _mm512_storeu_ps(grad[t] + 16, h);
  }
}

}  // namespace chainfed

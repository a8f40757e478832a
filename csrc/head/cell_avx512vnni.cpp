#include <immintrin.h>

#include <cmath>
#include <limits>

#include "head/cell.h"

namespace chainfed {
namespace {

// exp for x <= 0, within 2 units in the last place; below -87 the result is 0. NaN stays NaN.
__m512 exp_negative(__m512 x) {
  const __mmask16 underflow = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  // Taylor coefficients 1/7! .. 1/2!: on |r| <= ln(2)/2 the next term is below half a unit in the last place.
  __m512 p = _mm512_set1_ps(1.984126984e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.388888889e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.333333333e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.166666667e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.1666666667f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_mask_blend_ps(underflow, _mm512_scalef_ps(p, n), _mm512_setzero_ps());
}

__mmask16 lanes(int64_t count) { return count >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1); }

}  // namespace

float softmax_row_avx512vnni(float* z, int64_t count, float* running_max, float* running_sum) {
  const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 max_lanes = lowest;
  __mmask16 nan = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 value = _mm512_mask_loadu_ps(lowest, lanes(count - i), z + i);
    nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    max_lanes = _mm512_max_ps(max_lanes, value);
  }
  const float max = std::fmax(*running_max, _mm512_reduce_max_ps(max_lanes));
  if (nan != 0 || !std::isfinite(max)) {
    *running_max = *running_sum = std::numeric_limits<float>::quiet_NaN();
    for (int64_t i = 0; i < count; ++i) z[i] = 0.0f;
    return 1.0f;
  }
  const __m512 shift = _mm512_set1_ps(max);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = lanes(count - i);
    const __m512 e = exp_negative(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, z + i), shift));
    _mm512_mask_storeu_ps(z + i, mask, e);
    sum = _mm512_mask_add_ps(sum, mask, sum, e);
  }
  const float rescale = std::exp(*running_max - max);
  *running_max = max;
  *running_sum = *running_sum * rescale + _mm512_reduce_add_ps(sum);
  return rescale;
}

void fill_cell_avx512vnni(const float* const* e, int64_t count, const float* least, Cell* cell) {
  __m512 left_out[kBlockTokens] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int32_t used = 0;
  for (int64_t first = 0; first < count; first += 16) {
    const __mmask16 present = lanes(count - first);
    __mmask16 wanted = 0;
    __m128 quad[16];  // lane l of quad[i]: token l, row i
    __m512 kept[kBlockTokens];
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      const __m512 value = _mm512_maskz_loadu_ps(present, e[t] + first);
      const __mmask16 keep = _mm512_cmp_ps_mask(value, _mm512_set1_ps(least[t]), _CMP_GE_OQ);
      kept[t] = _mm512_maskz_mov_ps(keep, value);
      left_out[t] = _mm512_mask_add_ps(left_out[t], static_cast<__mmask16>(~keep), left_out[t], value);
      wanted |= keep;
    }
    if (wanted == 0) continue;
    // A 4 x 16 transpose within 128-bit lanes: lane group g of part[i] holds row 4 g + i of all four tokens.
    const __m512 low01 = _mm512_unpacklo_ps(kept[0], kept[1]), high01 = _mm512_unpackhi_ps(kept[0], kept[1]);
    const __m512 low23 = _mm512_unpacklo_ps(kept[2], kept[3]), high23 = _mm512_unpackhi_ps(kept[2], kept[3]);
    const __m512 part[4] = {_mm512_shuffle_ps(low01, low23, 0x44), _mm512_shuffle_ps(low01, low23, 0xEE),
                            _mm512_shuffle_ps(high01, high23, 0x44), _mm512_shuffle_ps(high01, high23, 0xEE)};
    for (int i = 0; i < 4; ++i) {
      quad[i] = _mm512_castps512_ps128(part[i]);
      quad[4 + i] = _mm512_extractf32x4_ps(part[i], 1);
      quad[8 + i] = _mm512_extractf32x4_ps(part[i], 2);
      quad[12 + i] = _mm512_extractf32x4_ps(part[i], 3);
    }
    for (unsigned mask = wanted; mask != 0; mask &= mask - 1) {
      const int i = __builtin_ctz(mask);
      _mm_store_ps(cell->weight[used], quad[i]);
      cell->row[used++] = static_cast<uint8_t>(first + i);
    }
  }
  float rest[kBlockTokens];
  bool any = false;
  for (int64_t t = 0; t < kBlockTokens; ++t) any |= (rest[t] = _mm512_reduce_add_ps(left_out[t])) > 0;
  if (any) {
    _mm_store_ps(cell->weight[used], _mm_loadu_ps(rest));
    cell->row[used++] = kMeanRow;
  }
  cell->count = used;
}

void accumulate_cell_avx512vnni(const Cell& cell, const float* panel, float* const* grad) {
  __m512 left[kBlockTokens], right[kBlockTokens];
  for (int64_t t = 0; t < kBlockTokens; ++t) left[t] = right[t] = _mm512_setzero_ps();
  for (int32_t k = 0; k < cell.count; ++k) {
    const float* w = panel + static_cast<int64_t>(cell.row[k]) * kPanelCols;
    const __m512 a = _mm512_load_ps(w), b = _mm512_load_ps(w + 16);
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      const __m512 weight = _mm512_set1_ps(cell.weight[k][t]);
      left[t] = _mm512_fmadd_ps(weight, a, left[t]);
      right[t] = _mm512_fmadd_ps(weight, b, right[t]);
    }
  }
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    _mm512_storeu_ps(grad[t], _mm512_add_ps(_mm512_loadu_ps(grad[t]), left[t]));
    _mm512_storeu_ps(grad[t] + 16, _mm512_add_ps(_mm512_loadu_ps(grad[t] + 16), right[t]));
  }
}

}  // namespace chainfed

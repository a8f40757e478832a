#include <immintrin.h>

#include <cmath>
#include <limits>

#include "head/cell.h"

namespace chainfed {
namespace {

// exp for x <= 0, within 2 units in the last place; below -87 the result is 0. x is not NaN.
__m256 exp_negative(__m256 x) {
  const __m256 underflow = _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_LT_OQ);
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  // Taylor coefficients 1/7! .. 1/2!: on |r| <= ln(2)/2 the next term is below half a unit in the last place.
  __m256 p = _mm256_set1_ps(1.984126984e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.388888889e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.333333333e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.166666667e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.1666666667f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_andnot_ps(underflow, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

float reduce_add(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

float reduce_max(__m256 v) {
  __m128 max = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  max = _mm_max_ps(max, _mm_movehl_ps(max, max));
  return _mm_cvtss_f32(_mm_max_ss(max, _mm_movehdup_ps(max)));
}

}  // namespace

float softmax_row_avx2(float* z, int64_t count, float* running_max, float* running_sum) {
  const int64_t whole = count / 8 * 8;
  const __m256 lowest = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
  alignas(32) float tail[8];
  _mm256_store_ps(tail, lowest);
  for (int64_t i = whole; i < count; ++i) tail[i - whole] = z[i];
  __m256 last = _mm256_load_ps(tail);
  __m256 max_lanes = last, nan = _mm256_cmp_ps(last, last, _CMP_UNORD_Q);
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256 value = _mm256_loadu_ps(z + i);
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    max_lanes = _mm256_max_ps(max_lanes, value);
  }
  const float max = std::fmax(*running_max, reduce_max(max_lanes));
  if (_mm256_movemask_ps(nan) != 0 || !std::isfinite(max)) {
    *running_max = *running_sum = std::numeric_limits<float>::quiet_NaN();
    for (int64_t i = 0; i < count; ++i) z[i] = 0.0f;
    return 1.0f;
  }
  const __m256 shift = _mm256_set1_ps(max);
  last = exp_negative(_mm256_sub_ps(last, shift));
  _mm256_store_ps(tail, last);
  for (int64_t i = whole; i < count; ++i) z[i] = tail[i - whole];
  __m256 sum = last;
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256 e = exp_negative(_mm256_sub_ps(_mm256_loadu_ps(z + i), shift));
    _mm256_storeu_ps(z + i, e);
    sum = _mm256_add_ps(sum, e);
  }
  const float rescale = std::exp(*running_max - max);
  *running_max = max;
  *running_sum = *running_sum * rescale + reduce_add(sum);
  return rescale;
}

void fill_cell_avx2(const float* const* e, int64_t count, const float* least, Cell* cell) {
  const __m128 bound = _mm_loadu_ps(least);
  __m128 left_out = _mm_setzero_ps();
  int32_t used = 0;
  const auto take = [&](__m128 value, int64_t row) {
    const __m128 keep = _mm_cmpge_ps(value, bound);
    left_out = _mm_add_ps(left_out, _mm_andnot_ps(keep, value));
    _mm_store_ps(cell->weight[used], _mm_and_ps(keep, value));
    cell->row[used] = static_cast<uint8_t>(row);
    used += _mm_movemask_ps(keep) != 0;
  };
  int64_t row = 0;
  for (; row + 4 <= count; row += 4) {
    __m128 a = _mm_loadu_ps(e[0] + row), b = _mm_loadu_ps(e[1] + row);
    __m128 c = _mm_loadu_ps(e[2] + row), d = _mm_loadu_ps(e[3] + row);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    take(a, row);
    take(b, row + 1);
    take(c, row + 2);
    take(d, row + 3);
  }
  for (; row < count; ++row) take(_mm_setr_ps(e[0][row], e[1][row], e[2][row], e[3][row]), row);
  if (_mm_movemask_ps(_mm_cmpgt_ps(left_out, _mm_setzero_ps())) != 0) {
    _mm_store_ps(cell->weight[used], left_out);
    cell->row[used++] = kMeanRow;
  }
  cell->count = used;
}

void accumulate_cell_avx2(const Cell& cell, const float* panel, float* const* grad) {
  for (int64_t c = 0; c < kPanelCols; c += 16) {
    __m256 left[kBlockTokens], right[kBlockTokens];
    for (int64_t t = 0; t < kBlockTokens; ++t) left[t] = right[t] = _mm256_setzero_ps();
    for (int32_t k = 0; k < cell.count; ++k) {
      const float* w = panel + static_cast<int64_t>(cell.row[k]) * kPanelCols + c;
      const __m256 a = _mm256_load_ps(w), b = _mm256_load_ps(w + 8);
      for (int64_t t = 0; t < kBlockTokens; ++t) {
        const __m256 weight = _mm256_broadcast_ss(&cell.weight[k][t]);
        left[t] = _mm256_fmadd_ps(weight, a, left[t]);
        right[t] = _mm256_fmadd_ps(weight, b, right[t]);
      }
    }
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      _mm256_storeu_ps(grad[t] + c, _mm256_add_ps(_mm256_loadu_ps(grad[t] + c), left[t]));
      _mm256_storeu_ps(grad[t] + c + 8, _mm256_add_ps(_mm256_loadu_ps(grad[t] + c + 8), right[t]));
    }
  }
}

}  // namespace chainfed

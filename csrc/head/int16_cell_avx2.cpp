#include "head/int16_cell.h"

#include <immintrin.h>

#include <cstring>

namespace chainfed {
namespace {

__m128 inverse_or_zero(__m128 scale) {
  const __m128 usable = _mm_cmpge_ps(scale, _mm_set1_ps(kLeastScale));
  return _mm_and_ps(usable, _mm_div_ps(_mm_set1_ps(1.0f), scale));
}

__m256i quantize_8(const float* values, __m256 factor) {
  const __m256 largest = _mm256_set1_ps(kLargestInt16);
  const __m256 scaled = _mm256_mul_ps(_mm256_load_ps(values), factor);
  return _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(scaled, largest), _mm256_sub_ps(_mm256_setzero_ps(), largest)));
}

void quantize_row(const float* row, const __m256 factor[4], int16_t* out) {
  // packs works within 128-bit lanes, which is what gives the panel's lane order.
  for (int half = 0; half < 2; ++half) {
    const __m256i left = quantize_8(row + 8 * half, factor[half]);
    const __m256i right = quantize_8(row + 16 + 8 * half, factor[2 + half]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + 16 * half), _mm256_packs_epi32(left, right));
  }
}

int32_t pair_of_weights(const Int16Cell& cell, int32_t pair, int64_t t) {
  int32_t both;
  std::memcpy(&both, cell.weight[pair][t], sizeof both);
  return both;
}

}  // namespace

void quantize_cell_avx2(const Cell& cell, Int16Cell* out) {
  __m128 largest = _mm_setzero_ps(), sum = _mm_setzero_ps();
  for (int32_t k = 0; k < cell.count; ++k) {
    const __m128 weight = _mm_load_ps(cell.weight[k]);
    largest = _mm_max_ps(largest, weight);
    sum = _mm_add_ps(sum, weight);
  }
  const __m128 scale =
      _mm_max_ps(_mm_div_ps(largest, _mm_set1_ps(kLargestInt16)), _mm_div_ps(sum, _mm_set1_ps(kWeightSum)));
  const __m128 factor = inverse_or_zero(scale);
  _mm_storeu_ps(out->scale, scale);
  out->num_pairs = (cell.count + 1) / 2;
  const auto integers = [&](int32_t k) {
    const __m128 weight = _mm_mul_ps(_mm_load_ps(cell.weight[k]), factor);
    return _mm_cvtps_epi32(_mm_min_ps(weight, _mm_set1_ps(kLargestInt16)));
  };
  for (int32_t pair = 0; pair < out->num_pairs; ++pair) {
    const bool odd = 2 * pair + 1 == cell.count;
    const __m128i first = integers(2 * pair);
    const __m128i second = odd ? _mm_setzero_si128() : integers(2 * pair + 1);
    _mm_store_si128(reinterpret_cast<__m128i*>(out->weight[pair]), _mm_or_si128(first, _mm_slli_epi32(second, 16)));
    out->row[pair][0] = cell.row[2 * pair];
    out->row[pair][1] = odd ? cell.row[0] : cell.row[2 * pair + 1];
  }
}

void quantize_panel_avx2(const float* panel, int64_t num_rows, Int16Panel* out) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 largest[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int i = 0; i < 4; ++i) {
      largest[i] = _mm256_max_ps(largest[i], _mm256_andnot_ps(sign, _mm256_load_ps(panel + r * kPanelCols + 8 * i)));
    }
  }
  __m256 factor[4];
  for (int i = 0; i < 4; ++i) {
    const __m256 scale = _mm256_div_ps(largest[i], _mm256_set1_ps(kLargestInt16));
    const __m256 usable = _mm256_cmp_ps(scale, _mm256_set1_ps(kLeastScale), _CMP_GE_OQ);
    factor[i] = _mm256_and_ps(usable, _mm256_div_ps(_mm256_set1_ps(1.0f), scale));
    _mm256_store_ps(out->scale + 8 * i, scale);
  }
  for (int64_t r = 0; r < num_rows; ++r) quantize_row(panel + r * kPanelCols, factor, out->value[r]);
  quantize_row(panel + kMeanRow * kPanelCols, factor, out->value[kMeanRow]);
}

void accumulate_int16_avx2(const Int16Cell& cell, const Int16Panel& panel, float* const* grad) {
  for (int half = 0; half < 2; ++half) {  // lanes 16 * half .. + 15: columns 8 * half .. + 7 and 16 more
    __m256i left[kBlockTokens], right[kBlockTokens];
    for (int64_t t = 0; t < kBlockTokens; ++t) left[t] = right[t] = _mm256_setzero_si256();
    for (int32_t pair = 0; pair < cell.num_pairs; ++pair) {
      const auto* first = reinterpret_cast<const __m256i*>(panel.value[cell.row[pair][0]] + 16 * half);
      const auto* second = reinterpret_cast<const __m256i*>(panel.value[cell.row[pair][1]] + 16 * half);
      const __m256i a = _mm256_load_si256(first), b = _mm256_load_si256(second);
      const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
      for (int64_t t = 0; t < kBlockTokens; ++t) {
        const __m256i weight = _mm256_set1_epi32(pair_of_weights(cell, pair, t));
        left[t] = _mm256_add_epi32(left[t], _mm256_madd_epi16(weight, low));
        right[t] = _mm256_add_epi32(right[t], _mm256_madd_epi16(weight, high));
        // Token after token: scheduled together, the four weights push a sum out of the registers.
        __asm__ volatile("" : "+x"(left[t]), "+x"(right[t]));
      }
    }
    const __m256 scale_left = _mm256_load_ps(panel.scale + 8 * half);
    const __m256 scale_right = _mm256_load_ps(panel.scale + 16 + 8 * half);
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      const __m256 scale = _mm256_set1_ps(cell.scale[t]);
      float *g = grad[t] + 8 * half, *h = grad[t] + 16 + 8 * half;
      _mm256_storeu_ps(
          g, _mm256_fmadd_ps(_mm256_cvtepi32_ps(left[t]), _mm256_mul_ps(scale, scale_left), _mm256_loadu_ps(g)));
      _mm256_storeu_ps(
          h, _mm256_fmadd_ps(_mm256_cvtepi32_ps(right[t]), _mm256_mul_ps(scale, scale_right), _mm256_loadu_ps(h)));
    }
  }
}

}  // namespace chainfed

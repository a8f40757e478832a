#include "head/int16_cell.h"

#include <immintrin.h>

#include "base/step_avx2-inl.h"

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

alignas(32) constexpr int16_t kNoRow[kPanelCols] = {};

void interleave(const int16_t* first, const int16_t* second, int16_t (*pair)[2]) {
  for (int64_t half = 0; half < 2; ++half) {
    const __m256i a = load_aligned(first + 16 * half), b = load_aligned(second + 16 * half);
    auto* target = reinterpret_cast<__m256i*>(pair + 8 * half);
    _mm256_store_si256(target, _mm256_unpacklo_epi16(a, b));
    _mm256_store_si256(target + 2, _mm256_unpackhi_epi16(a, b));
  }
}

const uint8_t* pair_of_weights(const Int16Cell& cell, int32_t pair) {
  return reinterpret_cast<const uint8_t*>(cell.weight[pair]);
}

// grad[t][c], grad[t][c + distance] += the sums of 8 columns each. Inlined, or the sums would have an address and be
// stored once a step, lest the assembly reads them.
__attribute__((always_inline)) inline void add_sums(const Int16Cell& cell, const Int16Panel& panel,
                                                    const __m256i (&sum)[kStepTokens][2], int64_t column,
                                                    int64_t distance, float* const* grad) {
#pragma GCC unroll 2
  for (int64_t i = 0; i < 2; ++i) {
    const __m256 panel_scale = _mm256_load_ps(panel.scale + column + i * distance);
#pragma GCC unroll 4
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      float* target = grad[t] + column + i * distance;
      const __m256 scale = _mm256_mul_ps(_mm256_broadcast_ss(cell.scale + t), panel_scale);
      _mm256_storeu_ps(target, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t][i]), scale, _mm256_loadu_ps(target)));
    }
  }
}

// Sixteen columns from `column` on, of a cell that lists all rows.
void accumulate_all_rows(const Int16Cell& cell, const Int16Panel& panel, int64_t column, float* const* grad) {
  __m256i sum[kStepTokens][2];
#pragma GCC unroll 4
  for (int64_t t = 0; t < kBlockTokens; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
  const int32_t num_pairs = cell.num_pairs;
  for (int32_t pair = 0; pair < num_pairs; ++pair) {
    const auto* w = panel.pair[pair][column];
    step_pairs(sum, load_aligned(w), load_aligned(w + 16), pair_of_weights(cell, pair), 4);
  }
  add_sums(cell, panel, sum, column, 8, grad);
}

// Lanes 16 * Half .. + 15 of the listed rows: columns 8 * Half .. + 7 and 16 more.
template <int64_t Half>
void accumulate_listed_rows(const Int16Cell& cell, const Int16Panel& panel, float* const* grad) {
  __m256i sum[kStepTokens][2];
#pragma GCC unroll 4
  for (int64_t t = 0; t < kBlockTokens; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
  const int32_t num_pairs = cell.num_pairs;
  for (int32_t pair = 0; pair < num_pairs; ++pair) {
    const __m256i a = load_aligned(panel.value[cell.row[pair][0]] + 16 * Half);
    const __m256i b = load_aligned(panel.value[cell.row[pair][1]] + 16 * Half);
    step_pairs(sum, _mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b), pair_of_weights(cell, pair), 4);
  }
  add_sums(cell, panel, sum, 8 * Half, 16, grad);
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
  for (int64_t r = 0; r < num_rows; r += 2) {
    interleave(out->value[r], r + 1 < num_rows ? out->value[r + 1] : kNoRow, out->pair[r / 2]);
  }
  interleave(out->value[kMeanRow], kNoRow, out->pair[kMeanRow / 2]);
}

void accumulate_int16_avx2(const Int16Cell& cell, const Int16Panel& panel, float* const* grad) {
  if (cell.lists_all_rows()) {
    accumulate_all_rows(cell, panel, 0, grad);
    accumulate_all_rows(cell, panel, 16, grad);
  } else {
    accumulate_listed_rows<0>(cell, panel, grad);
    accumulate_listed_rows<1>(cell, panel, grad);
  }
}

}  // namespace chainfed

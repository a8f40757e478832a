#include "head/int16_cell.h"

#include <immintrin.h>

#include <cstring>

namespace chainfed {
namespace {

// Sums [t][half] of 4 tokens and 32 columns.
struct Sums {
  __m512i token[kBlockTokens][2];
};

// Adds two rows' products. In assembly because GCC, given the intrinsics, copies every sum to another register and
// back, which is twice the instructions.
inline void add_pair(Sums& sum, const int16_t (*weight)[2], const __m512i& low, const __m512i& high) {
  __m512i both;
  asm("vpbroadcastd %[w0], %[both]\n\t"
      "vpdpwssd %[low], %[both], %[l0]\n\t"
      "vpdpwssd %[high], %[both], %[h0]\n\t"
      "vpbroadcastd %[w1], %[both]\n\t"
      "vpdpwssd %[low], %[both], %[l1]\n\t"
      "vpdpwssd %[high], %[both], %[h1]\n\t"
      "vpbroadcastd %[w2], %[both]\n\t"
      "vpdpwssd %[low], %[both], %[l2]\n\t"
      "vpdpwssd %[high], %[both], %[h2]\n\t"
      "vpbroadcastd %[w3], %[both]\n\t"
      "vpdpwssd %[low], %[both], %[l3]\n\t"
      "vpdpwssd %[high], %[both], %[h3]"
      : [both] "=&v"(both), [l0] "+&v"(sum.token[0][0]), [h0] "+&v"(sum.token[0][1]), [l1] "+&v"(sum.token[1][0]),
        [h1] "+&v"(sum.token[1][1]), [l2] "+&v"(sum.token[2][0]), [h2] "+&v"(sum.token[2][1]),
        [l3] "+&v"(sum.token[3][0]), [h3] "+&v"(sum.token[3][1])
      : [low] "v"(low), [high] "v"(high), [w0] "m"(weight[0]), [w1] "m"(weight[1]), [w2] "m"(weight[2]),
        [w3] "m"(weight[3]));
}

}  // namespace

void accumulate_int16_avx512vnni(const Int16Cell& cell, const Int16Panel& panel, float* const* grad) {
  static_assert(kBlockTokens == 4 && kPanelCols == 32, "what add_pair adds");
  // Two sets of sums in turn: a sum may be added to every fifth cycle, and eight do not fill two ports that long.
  Sums even, odd;
#pragma GCC unroll 4
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    even.token[t][0] = even.token[t][1] = odd.token[t][0] = odd.token[t][1] = _mm512_setzero_si512();
  }
  int32_t pair = 0;
  if (cell.lists_all_rows()) {
    const auto add = [&](Sums& sum, int32_t index) __attribute__((always_inline)) {
      const auto* rows = panel.pair[index];
      add_pair(sum, cell.weight[index], _mm512_load_si512(rows), _mm512_load_si512(rows[16]));
    };
    for (; pair + 2 <= cell.num_pairs; pair += 2) {
      add(even, pair);
      add(odd, pair + 1);
    }
    if (pair < cell.num_pairs) add(even, pair);
  } else {
    const auto add = [&](Sums& sum, int32_t index) __attribute__((always_inline)) {
      const __m512i a = _mm512_load_si512(panel.value[cell.row[index][0]]);
      const __m512i b = _mm512_load_si512(panel.value[cell.row[index][1]]);
      add_pair(sum, cell.weight[index], _mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b));
    };
    for (; pair + 2 <= cell.num_pairs; pair += 2) {
      add(even, pair);
      add(odd, pair + 1);
    }
    if (pair < cell.num_pairs) add(even, pair);
  }
  const __m512 scale_left = _mm512_load_ps(panel.scale), scale_right = _mm512_load_ps(panel.scale + 16);
#pragma GCC unroll 4
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    const __m512 scale = _mm512_set1_ps(cell.scale[t]);
    const __m512 left = _mm512_cvtepi32_ps(_mm512_add_epi32(even.token[t][0], odd.token[t][0]));
    const __m512 right = _mm512_cvtepi32_ps(_mm512_add_epi32(even.token[t][1], odd.token[t][1]));
    _mm512_storeu_ps(grad[t], _mm512_fmadd_ps(left, _mm512_mul_ps(scale, scale_left), _mm512_loadu_ps(grad[t])));
    _mm512_storeu_ps(grad[t] + 16,
                     _mm512_fmadd_ps(right, _mm512_mul_ps(scale, scale_right), _mm512_loadu_ps(grad[t] + 16)));
  }
}

}  // namespace chainfed

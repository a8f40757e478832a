// Packing of activations in AVX2, shared by the AVX2 and AVX-512 kernels (each file compiles its own copy; internal
// linkage).
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "gemm/int8_gemm.h"
#include "quant/tile.h"

namespace chainfed {
namespace {

constexpr float kSmallestAbsmax = 1.5e-36f;  // 127 times the smallest normal f32: below, the 32 inputs count as zero

// Lane i of the result is the largest lane (as unsigned) of v[i].
inline __m128i largest_of_each(const __m256i v[4]) {
  const __m256i a = _mm256_max_epu32(_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
  const __m256i b = _mm256_max_epu32(_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
  const __m256i c = _mm256_max_epu32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  return _mm_max_epu32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
}

// Lane i of the result is the sum of the 32 signed bytes of v[i].
inline __m128i sum_of_each(const __m256i v[4]) {
  const __m256i one_byte = _mm256_set1_epi8(1), one_word = _mm256_set1_epi16(1);
  __m256i fours[4];
  for (int i = 0; i < 4; ++i) fours[i] = _mm256_madd_epi16(_mm256_maddubs_epi16(one_byte, v[i]), one_word);
  const __m256i sum = _mm256_hadd_epi32(_mm256_hadd_epi32(fours[0], fours[1]), _mm256_hadd_epi32(fours[2], fours[3]));
  return _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
}

inline __m256i magnitude_bits(const float* x) {
  return _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(x)), _mm256_set1_epi32(0x7FFFFFFF));
}

inline __m256i codes_of_32(const float* x, __m256 inverse) {
  __m256i q[4];
  for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inverse));
  // The packs work inside 128-bit halves; the permutation restores the order.
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// What a group holds beside the scales.
struct ScaledSums {
  static __m128i of(__m128 scale, __m128i sum) { return _mm_castps_si128(_mm_mul_ps(scale, _mm_cvtepi32_ps(sum))); }
};
struct MinusZeroPoint {  // of a WideBlock: -128 times the sum
  static __m128i of(__m128, __m128i sum) { return _mm_sub_epi32(_mm_setzero_si128(), _mm_slli_epi32(sum, 7)); }
};

// Four times 32 inputs: codes, sx, and what Sums makes of sx and the sum of codes.
template <typename Sums>
inline void quantise_4x32(const float* x, __m256i codes[4], float scales[4], float sums[4]) {
  // Magnitudes compare as integers, and NaN and Inf lie above all finite values.
  __m256i magnitudes[4];
  for (int i = 0; i < 4; ++i, x += kTileCols) {
    magnitudes[i] = _mm256_max_epu32(_mm256_max_epu32(magnitude_bits(x), magnitude_bits(x + 8)),
                                     _mm256_max_epu32(magnitude_bits(x + 16), magnitude_bits(x + 24)));
  }
  x -= 4 * kTileCols;
  const __m128i bits = largest_of_each(magnitudes);
  const __m128 absmax = _mm_castsi128_ps(bits);
  const __m128 infinite = _mm_castsi128_ps(_mm_cmpgt_epi32(bits, _mm_set1_epi32(0x7F7FFFFF)));
  const __m128 usable = _mm_andnot_ps(infinite, _mm_cmpge_ps(absmax, _mm_set1_ps(kSmallestAbsmax)));
  alignas(16) float inverse[4];
  alignas(16) int32_t mask[4];
  _mm_store_ps(inverse, _mm_and_ps(usable, _mm_div_ps(_mm_set1_ps(127.0f), absmax)));
  _mm_store_ps(reinterpret_cast<float*>(mask), usable);
  for (int i = 0; i < 4; ++i) {
    const __m256i q = codes_of_32(x + i * kTileCols, _mm256_set1_ps(inverse[i]));
    codes[i] = _mm256_and_si256(q, _mm256_set1_epi32(mask[i]));  // NaN times 0 would not give code 0
  }
  __m128 scale = _mm_and_ps(usable, _mm_mul_ps(absmax, _mm_set1_ps(1.0f / 127.0f)));
  scale = _mm_or_ps(scale, infinite);  // all ones is a NaN
  _mm_storeu_ps(scales, scale);
  _mm_storeu_ps(sums, _mm_castsi128_ps(Sums::of(scale, sum_of_each(codes))));
}

inline __m256i load_bytes(const uint8_t* bytes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)); }
inline void store_bytes(uint8_t* bytes, __m256i value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), value);
}
inline __m256 load_f16(const uint16_t* halves) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
}

// The 32 codes of a token, in one byte or two each.
template <int64_t CodeBytes>
inline void store_codes(uint8_t* target, __m256i codes) {
  if constexpr (CodeBytes == 1) {
    store_bytes(target, codes);
  } else {
    store_bytes(target, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(codes)));
    store_bytes(target + kTileCols, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(codes, 1)));
  }
}

template <int64_t Group, typename Sums, int64_t CodeBytes = 1>
void pack(const float* x, int64_t num_tokens, int64_t num_cols, int64_t num_tiles, uint8_t* group) {
  for (int64_t t = 0; t < Group; ++t) {
    for (int64_t tile = 0; tile < num_tiles; tile += 4) {
      const int64_t left = t < num_tokens ? num_cols - tile * kTileCols : 0;
      const int64_t count = num_tiles - tile < 4 ? num_tiles - tile : 4;
      const float* source = x + t * num_cols + tile * kTileCols;
      float edge[4 * kTileCols];
      if (left < 4 * kTileCols) {
        for (int64_t i = 0; i < 4 * kTileCols; ++i) edge[i] = i < left ? source[i] : 0.0f;
        source = edge;
      }
      __m256i codes[4];
      float scales[4], sums[4];
      quantise_4x32<Sums>(source, codes, scales, sums);
      for (int64_t i = 0; i < count; ++i) {
        uint8_t* target = group + (tile + i) * group_tile_bytes(Group, CodeBytes);
        auto* target_scales = reinterpret_cast<float*>(target + Group * kTileCols * CodeBytes);
        store_codes<CodeBytes>(target + t * kTileCols * CodeBytes, codes[i]);
        target_scales[t] = scales[i];
        target_scales[Group + t] = sums[i];
      }
    }
  }
}

}  // namespace
}  // namespace chainfed

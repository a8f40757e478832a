#include <immintrin.h>

#include "boundary/codec.h"
#include "boundary/encode_int8-inl.h"

namespace chainfed {
namespace {

__m512i magnitudes(__m512 values) {
  return _mm512_and_si512(_mm512_castps_si512(values), _mm512_set1_epi32(static_cast<int>(kMagnitudeMask)));
}

__m512i load_magnitudes(const float* values) { return magnitudes(_mm512_loadu_ps(values)); }

// Magnitudes have a clear sign bit, so signed maxima order them; the compiler's own reduction takes more steps.
uint32_t reduce_max(__m512i values) {
  const __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(values), _mm512_extracti64x4_epi64(values, 1));
  __m128i quarter = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  quarter = _mm_max_epi32(quarter, _mm_shuffle_epi32(quarter, 0x4E));
  quarter = _mm_max_epi32(quarter, _mm_shuffle_epi32(quarter, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(quarter));
}

struct Avx512 {
  static __m512i max_of_group(const float* values) {
    const __m512i low = _mm512_max_epu32(load_magnitudes(values), load_magnitudes(values + 16));
    const __m512i high = _mm512_max_epu32(load_magnitudes(values + 32), load_magnitudes(values + 48));
    return _mm512_max_epu32(low, high);
  }
  static uint32_t max_bits(const float* values) { return reduce_max(max_of_group(values)); }
  // Two groups a step: after two, a 128-bit quarter holds four groups; two more steps join the quarters.
  static void max_bits_of_8(const float* values, uint32_t* out) {
    __m512i two[4], four[2];
    for (int i = 0; i < 4; ++i) {
      const __m512i a = max_of_group(values + 2 * i * kGroupSize), b = max_of_group(values + (2 * i + 1) * kGroupSize);
      two[i] = _mm512_max_epu32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    }
    for (int i = 0; i < 2; ++i) {
      four[i] = _mm512_max_epu32(_mm512_unpacklo_epi64(two[2 * i], two[2 * i + 1]),
                                 _mm512_unpackhi_epi64(two[2 * i], two[2 * i + 1]));
    }
    const __m512i quarters =
        _mm512_max_epu32(_mm512_shuffle_i32x4(four[0], four[1], 0x44), _mm512_shuffle_i32x4(four[0], four[1], 0xEE));
    // Now groups 0-3 twice, then 4-7 twice.
    const __m512i all = _mm512_max_epu32(quarters, _mm512_shuffle_i32x4(quarters, quarters, 0xB1));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(_mm512_shuffle_i32x4(all, all, 0x08)));
  }
  static int64_t first_of_largest(const uint32_t* values, int64_t count) {
    __m512i largest = _mm512_load_si512(values);
    for (int64_t i = 16; i < count; i += 16) largest = _mm512_max_epu32(largest, _mm512_load_si512(values + i));
    const __m512i wanted = _mm512_set1_epi32(static_cast<int>(reduce_max(largest)));
    // 64 at a time, so that the loop's length does not depend on where the largest is.
    for (int64_t first = 0;; first += 64) {
      uint64_t mask = 0;
      for (int64_t i = 0; i < std::min<int64_t>(64, count - first); i += 16) {
        mask |= static_cast<uint64_t>(_mm512_cmpeq_epu32_mask(_mm512_load_si512(values + first + i), wanted)) << i;
      }
      if (mask != 0) return first + __builtin_ctzll(mask);
    }
  }
  static void replace(uint32_t* values, int64_t index, uint32_t value) {
    uint32_t* vector = values + index / 16 * 16;
    const auto here = static_cast<__mmask16>(1u << index % 16);
    _mm512_store_si512(vector, _mm512_mask_set1_epi32(_mm512_load_si512(vector), here, static_cast<int>(value)));
  }
  static Taken take(const float* values, uint32_t bits) {
    const __m512i wanted = _mm512_set1_epi32(static_cast<int>(bits));
    __m512i below = _mm512_setzero_si512();
    uint64_t equal = 0;
    for (int i = 0; i < 4; ++i) {
      const __m512i value = load_magnitudes(values + 16 * i);
      equal |= static_cast<uint64_t>(_mm512_cmpeq_epu32_mask(value, wanted)) << (16 * i);
      below = _mm512_mask_max_epu32(below, _mm512_cmplt_epu32_mask(value, wanted), below, value);
    }
    return {equal, reduce_max(below)};
  }
  static void scales(const uint32_t* max_bits, int64_t count, uint16_t* halves, float* inverse) {
    for (int64_t g = 0; g < count; g += 16) {
      const __m512 largest = _mm512_castsi512_ps(_mm512_load_si512(max_bits + g));
      const __m512 scale = _mm512_div_ps(largest, _mm512_set1_ps(127.0f));
      const __m256i rounded_up = _mm512_cvtps_ph(scale, _MM_FROUND_TO_POS_INF);
      // An infinite or NaN maximum gives an infinite or NaN half, too.
      const __mmask16 good = _mm256_cmplt_epu16_mask(rounded_up, _mm256_set1_epi16(kInfinityHalf));
      const __mmask16 positive = _mm256_cmpneq_epi16_mask(rounded_up, _mm256_setzero_si256());
      const __m256i half = _mm256_mask_blend_epi16(good, _mm256_set1_epi16(kNanHalf), rounded_up);
      _mm256_store_si256(reinterpret_cast<__m256i*>(halves + g), half);
      const __m512 stored = _mm512_cvtph_ps(rounded_up);
      _mm512_store_ps(inverse + g, _mm512_maskz_div_ps(good & positive, _mm512_set1_ps(1.0f), stored));
    }
  }
  static void quantize(const float* values, float inverse, int8_t* codes) {
    const __m512 factor = _mm512_set1_ps(inverse);
    __m512i code[4];
    for (int i = 0; i < 4; ++i) {
      code[i] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values + 16 * i), factor));
    }
    // The packs work inside 128-bit quarters; the permutation restores the order. Half of what narrowing each would
    // take.
    const __m512i bytes =
        _mm512_packs_epi16(_mm512_packs_epi32(code[0], code[1]), _mm512_packs_epi32(code[2], code[3]));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(codes, _mm512_permutexvar_epi32(order, bytes));
  }
};

}  // namespace

void encode_int8_avx512vnni(const float* rows, int64_t num_tokens, int64_t hidden_size, uint8_t* records) {
  encode_int8_rows<Avx512>(rows, num_tokens, hidden_size, records);
}

void decode_int8_row_avx512vnni(const uint8_t* record, int64_t hidden_size, float* row) {
  const uint8_t* scales = record + scales_offset(hidden_size);
  for (int64_t g = 0; g < num_groups(hidden_size); ++g) {
    const int64_t first = g * kGroupSize;
    const int64_t width = hidden_size - first;
    const uint64_t present = width >= kGroupSize ? ~uint64_t{0} : (uint64_t{1} << width) - 1;
    uint16_t half;
    std::memcpy(&half, scales + g * 2, sizeof half);
    const __m512 scale = _mm512_set1_ps(_cvtsh_ss(half));
    for (int i = 0; i < 4; ++i) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(record + first + 16 * i));
      const __m512 values = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
      _mm512_mask_storeu_ps(row + first + 16 * i, static_cast<__mmask16>(present >> (16 * i)), values);
    }
  }
  patch_outliers(record, hidden_size, row);
}

}  // namespace chainfed

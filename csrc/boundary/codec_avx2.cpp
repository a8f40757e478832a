#include <immintrin.h>

#include "boundary/codec.h"
#include "boundary/encode_int8-inl.h"

namespace chainfed {
namespace {

__m256i load_magnitudes(const float* values) {
  return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)),
                          _mm256_set1_epi32(static_cast<int>(kMagnitudeMask)));
}

__m256i max_of(__m256i a, __m256i b) { return _mm256_max_epi32(a, b); }

uint32_t reduce_max(__m256i values) {
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4E));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(half));
}

unsigned equal_mask(__m256i a, __m256i b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b))));
}

// 32 integers to bytes in order, with saturation.
__m256i bytes_of_32(const __m256i v[4]) {
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
  // The packs work inside 128-bit halves; the permutation restores the order.
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// Magnitudes have a clear sign bit, so signed maxima and comparisons order them.
struct Avx2 {
  static __m256i max_of_group(const float* values) {
    __m256i low = max_of(load_magnitudes(values), load_magnitudes(values + 8));
    __m256i high = max_of(load_magnitudes(values + 16), load_magnitudes(values + 24));
    low = max_of(low, max_of(load_magnitudes(values + 32), load_magnitudes(values + 40)));
    high = max_of(high, max_of(load_magnitudes(values + 48), load_magnitudes(values + 56)));
    return max_of(low, high);
  }
  static uint32_t max_bits(const float* values) { return reduce_max(max_of_group(values)); }
  // Two groups a step: after three, lane g holds the maximum of group g.
  static void max_bits_of_8(const float* values, uint32_t* out) {
    __m256i two[4], four[2];
    for (int i = 0; i < 4; ++i) {
      const __m256i a = max_of_group(values + 2 * i * kGroupSize), b = max_of_group(values + (2 * i + 1) * kGroupSize);
      two[i] = max_of(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    }
    for (int i = 0; i < 2; ++i) {
      four[i] =
          max_of(_mm256_unpacklo_epi64(two[2 * i], two[2 * i + 1]), _mm256_unpackhi_epi64(two[2 * i], two[2 * i + 1]));
    }
    const __m256i all =
        max_of(_mm256_permute2x128_si256(four[0], four[1], 0x20), _mm256_permute2x128_si256(four[0], four[1], 0x31));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), all);
  }
  static int64_t first_of_largest(const uint32_t* values, int64_t count) {
    const auto* vectors = reinterpret_cast<const __m256i*>(values);
    __m256i largest = _mm256_load_si256(vectors);
    for (int64_t i = 1; i < count / 8; ++i) largest = max_of(largest, _mm256_load_si256(vectors + i));
    const __m256i wanted = _mm256_set1_epi32(static_cast<int>(reduce_max(largest)));
    // 64 at a time, so that the loop's length does not depend on where the largest is.
    for (int64_t first = 0;; first += 64) {
      uint64_t mask = 0;
      for (int64_t i = 0; i < std::min<int64_t>(64, count - first); i += 8) {
        mask |= static_cast<uint64_t>(equal_mask(_mm256_load_si256(vectors + (first + i) / 8), wanted)) << i;
      }
      if (mask != 0) return first + __builtin_ctzll(mask);
    }
  }
  static void replace(uint32_t* values, int64_t index, uint32_t value) {
    auto* vector = reinterpret_cast<__m256i*>(values + index / 8 * 8);
    const __m256i place = _mm256_set1_epi32(static_cast<int>(index % 8));
    const __m256i here = _mm256_cmpeq_epi32(place, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256i wanted = _mm256_set1_epi32(static_cast<int>(value));
    _mm256_store_si256(vector, _mm256_blendv_epi8(_mm256_load_si256(vector), wanted, here));
  }
  static Taken take(const float* values, uint32_t bits) {
    const __m256i wanted = _mm256_set1_epi32(static_cast<int>(bits));
    __m256i below = _mm256_setzero_si256(), equal[8];
    for (int i = 0; i < 8; ++i) {
      const __m256i value = load_magnitudes(values + 8 * i);
      equal[i] = _mm256_cmpeq_epi32(value, wanted);
      below = max_of(below, _mm256_and_si256(value, _mm256_cmpgt_epi32(wanted, value)));
    }
    const uint64_t low = static_cast<uint32_t>(_mm256_movemask_epi8(bytes_of_32(equal)));
    const uint64_t high = static_cast<uint32_t>(_mm256_movemask_epi8(bytes_of_32(equal + 4)));
    return {low | high << 32, reduce_max(below)};
  }
  static void scales(const uint32_t* max_bits, int64_t count, uint16_t* halves, float* inverse) {
    const __m256i largest_half = _mm256_set1_epi32(kInfinityHalf - 1);
    for (int64_t g = 0; g < count; g += 8) {
      const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(max_bits + g));
      const __m256 scale = _mm256_div_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(127.0f));
      const __m128i rounded_up = _mm256_cvtps_ph(scale, _MM_FROUND_TO_POS_INF);
      // An infinite or NaN maximum gives an infinite or NaN half, too.
      const __m256i wide = _mm256_cvtepu16_epi32(rounded_up);
      const __m256i bad = _mm256_cmpgt_epi32(wide, largest_half);
      const __m256i half = _mm256_blendv_epi8(wide, _mm256_set1_epi32(kNanHalf), bad);
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
      _mm_store_si128(reinterpret_cast<__m128i*>(halves + g), _mm256_castsi256_si128(packed));
      const __m256i zero = _mm256_cmpeq_epi32(wide, _mm256_setzero_si256());
      const __m256 reciprocal = _mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_cvtph_ps(rounded_up));
      _mm256_store_ps(inverse + g, _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_or_si256(bad, zero)), reciprocal));
    }
  }
  static void quantize(const float* values, float inverse, int8_t* codes) {
    const __m256 factor = _mm256_set1_ps(inverse);
    for (int64_t first = 0; first < kGroupSize; first += 32) {
      __m256i code[4];
      for (int i = 0; i < 4; ++i) {
        code[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + first + 8 * i), factor));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + first), bytes_of_32(code));
    }
  }
};

}  // namespace

void encode_int8_avx2(const float* rows, int64_t num_tokens, int64_t hidden_size, uint8_t* records) {
  encode_int8_rows<Avx2>(rows, num_tokens, hidden_size, records);
}

void decode_int8_row_avx2(const uint8_t* record, int64_t hidden_size, float* row) {
  const uint8_t* scales = record + scales_offset(hidden_size);
  const int64_t whole = hidden_size / kGroupSize * kGroupSize;
  for (int64_t first = 0; first < hidden_size; first += kGroupSize) {
    uint16_t half;
    std::memcpy(&half, scales + first / kGroupSize * 2, sizeof half);
    const __m256 scale = _mm256_set1_ps(_cvtsh_ss(half));
    float tail[kGroupSize];
    float* out = first < whole ? row + first : tail;
    for (int64_t i = 0; i < kGroupSize; i += 8) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(record + first + i));
      _mm256_storeu_ps(out + i, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))));
    }
    if (first == whole) std::memcpy(row + first, tail, static_cast<size_t>(hidden_size - whole) * sizeof(float));
  }
  patch_outliers(record, hidden_size, row);
}

void encode_bf16_avx2(const float* rows, int64_t num_tokens, int64_t hidden_size, uint8_t* records) {
  const int64_t count = num_tokens * hidden_size;  // records follow one another without a gap, as rows do
  const __m256i one = _mm256_set1_epi32(1), bias = _mm256_set1_epi32(0x7FFF);
  const __m256i quiet = _mm256_set1_epi32(0x400000);
  const __m256i infinity = _mm256_set1_epi32(static_cast<int>(kInfinityBits));
  const auto round_up_half = [&](const float* values) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(bias, odd));
    const __m256i is_nan = _mm256_cmpgt_epi32(load_magnitudes(values), infinity);
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_or_si256(bits, quiet), is_nan), 16);
  };
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256i packed = _mm256_packus_epi32(round_up_half(rows + i), round_up_half(rows + i + 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(records + 2 * i), _mm256_permute4x64_epi64(packed, 0xD8));
  }
  encode_bf16_scalar(rows + i, 1, count - i, records + 2 * i);
}

void decode_bf16_row_avx2(const uint8_t* record, int64_t hidden_size, float* row) {
  int64_t i = 0;
  for (; i + 8 <= hidden_size; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(record + 2 * i));
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + i), bits);
  }
  decode_bf16_row_scalar(record + 2 * i, hidden_size - i, row + i);
}

}  // namespace chainfed

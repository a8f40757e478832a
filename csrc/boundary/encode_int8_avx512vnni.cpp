#include "boundary/encode_int8_lanes-inl.h"

namespace chainfed {
namespace {

__m512i load_magnitudes(const float* values) {
  return _mm512_and_si512(_mm512_loadu_si512(values), _mm512_set1_epi32(static_cast<int>(kMagnitudeMask)));
}

// Eight lanes of the maxima of sixteen.
__m256i max_of_four(const __m512i v[4]) {
  const __m512i all = _mm512_max_epu32(_mm512_max_epu32(v[0], v[1]), _mm512_max_epu32(v[2], v[3]));
  return max_of(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
}

struct Avx512 {
  static __m256i max_of_group(const float* values) {
    const __m512i magnitudes[4] = {load_magnitudes(values), load_magnitudes(values + 16), load_magnitudes(values + 32),
                                   load_magnitudes(values + 48)};
    return max_of_four(magnitudes);
  }
  static Distances distances(const float* values, uint32_t from) {
    const __m512i bits = _mm512_set1_epi32(static_cast<int>(from));
    __m512i above[4];
    uint64_t equal = 0;
    for (int i = 0; i < 4; ++i) {
      above[i] = _mm512_sub_epi32(load_magnitudes(values + 16 * i), bits);
      equal |= static_cast<uint64_t>(_mm512_testn_epi32_mask(above[i], above[i])) << (16 * i);
    }
    return {max_of_four(above), equal};
  }
  static int64_t position(int64_t bit) { return bit; }
  static void quantize(const float* values, const float* inverse, uint8_t* codes) {
    const __m512 factor = _mm512_set1_ps(*inverse);
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
  encode_int8_lanes<Avx512>(rows, num_tokens, hidden_size, records);
}

}  // namespace chainfed

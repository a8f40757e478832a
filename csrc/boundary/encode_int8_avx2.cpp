#include "boundary/encode_int8_lanes-inl.h"

namespace chainfed {
namespace {

__m256i load_magnitudes(const float* values) {
  return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)), all_lanes(kMagnitudeMask));
}

// 32 integers to bytes, with saturation. The packs work inside 128-bit halves: byte i is of
// integer kPackedOrder[i] (of those of a second vector that follows: kPackedOrder[32 + i]).
__m256i pack(const __m256i v[4]) {
  return _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
}

constexpr uint8_t kPackedOrder[64] = {0,  1,  2,  3,  8,  9,  10, 11, 16, 17, 18, 19, 24, 25, 26, 27,
                                      4,  5,  6,  7,  12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31,
                                      32, 33, 34, 35, 40, 41, 42, 43, 48, 49, 50, 51, 56, 57, 58, 59,
                                      36, 37, 38, 39, 44, 45, 46, 47, 52, 53, 54, 55, 60, 61, 62, 63};

__m256i in_order(__m256i packed) {
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

struct Avx2 {
  static __m256i max_of_group(const float* values) {
    __m256i low = max_of(load_magnitudes(values), load_magnitudes(values + 8));
    __m256i high = max_of(load_magnitudes(values + 16), load_magnitudes(values + 24));
    low = max_of(low, max_of(load_magnitudes(values + 32), load_magnitudes(values + 40)));
    high = max_of(high, max_of(load_magnitudes(values + 48), load_magnitudes(values + 56)));
    return max_of(low, high);
  }
  __attribute__((always_inline)) static Distances distances(const float* values, uint32_t from) {
    const __m256i bits = all_lanes(from);
    __m256i above[8];
    for (int i = 0; i < 8; ++i) above[i] = _mm256_sub_epi32(load_magnitudes(values + 8 * i), bits);
    const __m256i low = max_of(max_of(above[0], above[1]), max_of(above[2], above[3]));
    const __m256i high = max_of(max_of(above[4], above[5]), max_of(above[6], above[7]));
    const auto equal = [](const __m256i* v) {  // saturation makes no 0 of what is none
      const int mask = _mm256_movemask_epi8(_mm256_cmpeq_epi8(pack(v), _mm256_setzero_si256()));
      return static_cast<uint64_t>(static_cast<uint32_t>(mask));
    };
    return {max_of(low, high), equal(above) | equal(above + 4) << 32};
  }
  static int64_t position(int64_t bit) { return kPackedOrder[bit]; }
  static void quantize(const float* values, const float* inverse, uint8_t* codes) {
    const __m256 factor = _mm256_broadcast_ss(inverse);
    for (int64_t first = 0; first < kGroupSize; first += 32) {
      __m256i code[4];
      for (int i = 0; i < 4; ++i) {
        code[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + first + 8 * i), factor));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + first), in_order(pack(code)));
    }
  }
};

}  // namespace

void encode_int8_avx2(const float* rows, int64_t num_tokens, int64_t hidden_size, uint8_t* records) {
  encode_int8_lanes<Avx2>(rows, num_tokens, hidden_size, records);
}

}  // namespace chainfed

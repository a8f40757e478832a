#include <immintrin.h>

#include <cstring>

#include "boundary/codec.h"
#include "boundary/record.h"

namespace chainfed {
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

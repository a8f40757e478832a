#include <immintrin.h>

#include "boundary/codec.h"
#include "boundary/record.h"

namespace chainfed {
namespace {

__m256i load_magnitudes(const float* values) {
  return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)),
                          _mm256_set1_epi32(static_cast<int>(kMagnitudeMask)));
}

}  // namespace

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

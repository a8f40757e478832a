#include <immintrin.h>

#include "boundary/codec.h"
#include "boundary/record.h"

namespace chainfed {
namespace {

__m256i load_magnitudes(const float* values) {
  return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)),
                          _mm256_set1_epi32(static_cast<int>(kMagnitudeMask)));
}

// Magnitudes have a clear sign bit, so the signed maximum orders them.
uint32_t max_magnitude_bits(const float* values /*[64]*/) {
  __m256i low = _mm256_max_epi32(load_magnitudes(values), load_magnitudes(values + 8));
  __m256i high = _mm256_max_epi32(load_magnitudes(values + 16), load_magnitudes(values + 24));
  low = _mm256_max_epi32(low, _mm256_max_epi32(load_magnitudes(values + 32), load_magnitudes(values + 40)));
  high = _mm256_max_epi32(high, _mm256_max_epi32(load_magnitudes(values + 48), load_magnitudes(values + 56)));
  low = _mm256_max_epi32(low, high);
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4E));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(half));
}

// Offers every value of a whole group that reaches `bound`.
void offer_group(const float* row, int64_t first, uint32_t bound, LargestMagnitudes& largest) {
  const __m256i below = _mm256_set1_epi32(static_cast<int>(bound) - 1);
  for (int64_t i = first; i < first + kGroupSize; i += 8) {
    const __m256i reaches = _mm256_cmpgt_epi32(load_magnitudes(row + i), below);
    unsigned mask = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(reaches)));
    for (; mask != 0; mask &= mask - 1) {
      const int64_t column = i + __builtin_ctz(mask);
      largest.offer(float_bits(row[column]) & kMagnitudeMask, column);
    }
  }
}

int64_t find_outliers(const float* row, int64_t hidden_size, uint32_t* group_max, uint16_t* columns) {
  const int64_t groups = num_groups(hidden_size), whole = hidden_size / kGroupSize;
  for (int64_t g = 0; g < whole; ++g) group_max[g] = max_magnitude_bits(row + g * kGroupSize);
  float tail[kGroupSize];
  if (whole < groups) {
    copy_group(row, hidden_size, whole, columns, 0, 0, tail);
    group_max[whole] = max_magnitude_bits(tail);
  }
  const int64_t slots = num_outliers(hidden_size);
  const uint32_t bound = outlier_bound(group_max, groups, slots);
  LargestMagnitudes largest(slots);
  for (int64_t g = 0; g < whole; ++g) {
    const uint32_t least = std::max(bound, largest.least_bits());
    if (group_max[g] >= least) offer_group(row, g * kGroupSize, least, largest);
  }
  for (int64_t i = whole * kGroupSize; i < hidden_size; ++i) {
    largest.offer(float_bits(row[i]) & kMagnitudeMask, i);
  }
  return largest.columns(columns);
}

void quantize_group(const float* values, float inverse, int8_t* codes) {
  const __m256 factor = _mm256_set1_ps(inverse);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes the packs' lane interleaving
  for (int64_t i = 0; i < kGroupSize; i += 32) {
    const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + i), factor));
    const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + i + 8), factor));
    const __m256i c = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + i + 16), factor));
    const __m256i d = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + i + 24), factor));
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), _mm256_permutevar8x32_epi32(bytes, order));
  }
}

}  // namespace

void encode_int8_row_avx2(const float* row, int64_t hidden_size, uint8_t* record) {
  uint32_t group_max[kMaxGroups];
  uint16_t columns[kMaxOutliers];
  const int64_t count = find_outliers(row, hidden_size, group_max, columns);
  int8_t* codes = reinterpret_cast<int8_t*>(record);
  uint8_t* scales = record + scales_offset(hidden_size);
  int64_t next = 0;
  for (int64_t group = 0; group < num_groups(hidden_size); ++group) {
    const int64_t begin = next, end = (group + 1) * kGroupSize;
    while (next < count && columns[next] < end) ++next;
    float copy[kGroupSize];
    const float* values = row + group * kGroupSize;
    uint32_t max_bits = group_max[group];
    if (next > begin || end > hidden_size) {
      copy_group(row, hidden_size, group, columns, begin, next, copy);
      values = copy;
      max_bits = max_magnitude_bits(copy);
    }
    const GroupScale scale = group_scale(max_bits);
    std::memcpy(scales + group * 2, &scale.half, 2);
    if (scale.inverse == 0.0f) {
      std::memset(codes + group * kGroupSize, 0, kGroupSize);
    } else {
      quantize_group(values, scale.inverse, codes + group * kGroupSize);
    }
  }
  write_outliers(row, hidden_size, columns, count, record);
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

void encode_bf16_row_avx2(const float* row, int64_t hidden_size, uint8_t* record) {
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
  for (; i + 16 <= hidden_size; i += 16) {
    const __m256i packed = _mm256_packus_epi32(round_up_half(row + i), round_up_half(row + i + 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(record + 2 * i), _mm256_permute4x64_epi64(packed, 0xD8));
  }
  encode_bf16_row_scalar(row + i, hidden_size - i, record + 2 * i);
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

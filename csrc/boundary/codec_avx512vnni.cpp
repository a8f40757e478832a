#include <immintrin.h>

#include "boundary/codec.h"
#include "boundary/record.h"

namespace chainfed {
namespace {

// The values of one group, masked to zero beyond the row's end and in the outliers' places.
struct Group {
  __m512 part[4];
};

Group load_group(const float* values, uint64_t keep) {
  Group group;
  for (int i = 0; i < 4; ++i) {
    group.part[i] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(keep >> (16 * i)), values + 16 * i);
  }
  return group;
}

__m512i magnitudes(__m512 values) {
  return _mm512_and_si512(_mm512_castps_si512(values), _mm512_set1_epi32(static_cast<int>(kMagnitudeMask)));
}

uint32_t max_magnitude_bits(const Group& group) {
  const __m512i low = _mm512_max_epu32(magnitudes(group.part[0]), magnitudes(group.part[1]));
  const __m512i high = _mm512_max_epu32(magnitudes(group.part[2]), magnitudes(group.part[3]));
  return static_cast<uint32_t>(_mm512_reduce_max_epu32(_mm512_max_epu32(low, high)));
}

// One bit a column of the group that exists.
uint64_t columns_present(int64_t hidden_size, int64_t group) {
  const int64_t width = hidden_size - group * kGroupSize;
  return width >= kGroupSize ? ~uint64_t{0} : (uint64_t{1} << width) - 1;
}

int64_t find_outliers(const float* row, int64_t hidden_size, uint32_t* group_max, uint16_t* columns) {
  const int64_t groups = num_groups(hidden_size), slots = num_outliers(hidden_size);
  for (int64_t g = 0; g < groups; ++g) {
    group_max[g] = max_magnitude_bits(load_group(row + g * kGroupSize, columns_present(hidden_size, g)));
  }
  const uint32_t bound = outlier_bound(group_max, groups, slots);
  LargestMagnitudes largest(slots);
  for (int64_t g = 0; g < groups; ++g) {
    const uint32_t least = std::max(bound, largest.least_bits());
    if (group_max[g] < least) continue;
    const uint64_t present = columns_present(hidden_size, g);
    const Group group = load_group(row + g * kGroupSize, present);
    uint64_t mask = 0;
    for (int i = 0; i < 4; ++i) {
      const __m512i least_bits = _mm512_set1_epi32(static_cast<int>(least));
      mask |= static_cast<uint64_t>(_mm512_cmpge_epu32_mask(magnitudes(group.part[i]), least_bits)) << (16 * i);
    }
    for (mask &= present; mask != 0; mask &= mask - 1) {
      const int64_t column = g * kGroupSize + __builtin_ctzll(mask);
      largest.offer(float_bits(row[column]) & kMagnitudeMask, column);
    }
  }
  return largest.columns(columns);
}

}  // namespace

void encode_int8_row_avx512vnni(const float* row, int64_t hidden_size, uint8_t* record) {
  uint32_t group_max[kMaxGroups];
  uint16_t columns[kMaxOutliers];
  const int64_t count = find_outliers(row, hidden_size, group_max, columns);
  uint8_t* scales = record + scales_offset(hidden_size);
  int64_t next = 0;
  for (int64_t g = 0; g < num_groups(hidden_size); ++g) {
    const int64_t first = g * kGroupSize, begin = next;
    uint64_t keep = columns_present(hidden_size, g);
    for (; next < count && columns[next] < first + kGroupSize; ++next)
      keep &= ~(uint64_t{1} << (columns[next] - first));
    const Group group = load_group(row + first, keep);
    const GroupScale scale = group_scale(next > begin ? max_magnitude_bits(group) : group_max[g]);
    std::memcpy(scales + g * 2, &scale.half, 2);
    const __m512 factor = _mm512_set1_ps(scale.inverse);
    for (int i = 0; i < 4; ++i) {
      // With no scale (all zero, or NaN) the codes are zero, whatever infinity * 0 would give.
      const __m512i code =
          _mm512_maskz_cvtps_epi32(scale.inverse == 0.0f ? 0 : 0xFFFF, _mm512_mul_ps(group.part[i], factor));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(record + first + 16 * i), _mm512_cvtsepi32_epi8(code));
    }
  }
  write_outliers(row, hidden_size, columns, count, record);
}

void decode_int8_row_avx512vnni(const uint8_t* record, int64_t hidden_size, float* row) {
  const uint8_t* scales = record + scales_offset(hidden_size);
  for (int64_t g = 0; g < num_groups(hidden_size); ++g) {
    const int64_t first = g * kGroupSize;
    const uint64_t present = columns_present(hidden_size, g);
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

#include <cmath>

#include "boundary/codec.h"
#include "boundary/record.h"

namespace chainfed {
namespace {

uint32_t max_magnitude_bits(const float* values, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, float_bits(values[i]) & kMagnitudeMask);
  return largest;
}

}  // namespace

void encode_int8_row_scalar(const float* row, int64_t hidden_size, uint8_t* record) {
  LargestMagnitudes largest(num_outliers(hidden_size));
  for (int64_t i = 0; i < hidden_size; ++i) largest.offer(float_bits(row[i]) & kMagnitudeMask, i);
  uint16_t columns[kMaxOutliers];
  const int64_t count = largest.columns(columns);

  int8_t* codes = reinterpret_cast<int8_t*>(record);
  uint8_t* scales = record + scales_offset(hidden_size);
  int64_t next = 0;
  for (int64_t group = 0; group < num_groups(hidden_size); ++group) {
    const int64_t begin = next;
    while (next < count && columns[next] < (group + 1) * kGroupSize) ++next;
    float values[kGroupSize];
    copy_group(row, hidden_size, group, columns, begin, next, values);
    const GroupScale scale = group_scale(max_magnitude_bits(values, kGroupSize));
    std::memcpy(scales + group * 2, &scale.half, 2);
    for (int64_t i = 0; i < kGroupSize; ++i) {
      codes[group * kGroupSize + i] =
          scale.inverse == 0.0f ? 0 : static_cast<int8_t>(std::nearbyint(values[i] * scale.inverse));
    }
  }
  write_outliers(row, hidden_size, columns, count, record);
}

void decode_int8_row_scalar(const uint8_t* record, int64_t hidden_size, float* row) {
  const int8_t* codes = reinterpret_cast<const int8_t*>(record);
  const uint8_t* scales = record + scales_offset(hidden_size);
  for (int64_t i = 0; i < hidden_size; ++i) {
    uint16_t half;
    std::memcpy(&half, scales + i / kGroupSize * 2, sizeof half);
    row[i] = f16_to_float(half) * static_cast<float>(codes[i]);
  }
  patch_outliers(record, hidden_size, row);
}

void encode_bf16_row_scalar(const float* row, int64_t hidden_size, uint8_t* record) {
  for (int64_t i = 0; i < hidden_size; ++i) {
    const uint16_t half = float_to_bf16(row[i]);
    std::memcpy(record + 2 * i, &half, sizeof half);
  }
}

void decode_bf16_row_scalar(const uint8_t* record, int64_t hidden_size, float* row) {
  for (int64_t i = 0; i < hidden_size; ++i) {
    uint16_t half;
    std::memcpy(&half, record + 2 * i, sizeof half);
    row[i] = bf16_to_float(half);
  }
}

}  // namespace chainfed

// The int8 record of one token, the byte layout behind CacheFormat::int8 (kernels.h): codes i8 [groups * 64], scales
// f16 [groups], outliers {u16 column, f32 value} [slots]. Nothing in a record is aligned: its size is even at best.
//
// The scale of a group is its largest remaining magnitude / 127, rounded up to f16, so that every remaining value
// decodes to within half a scale. The outliers are always the largest magnitudes of the token, whether or not they
// stand out of their group: the slots are there anyway, and taking the largest never raises a scale. NaN and infinity
// rank above every finite magnitude. What no slot can hold and no scale can express (a non-finite value, or one
// above 65504 * 127) makes the group's scale NaN: the whole group decodes to NaN instead of to a wrong number.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "base/half.h"

namespace chainfed {

constexpr int64_t kGroupSize = 64;
constexpr int64_t kOutlierBytes = 6;
constexpr uint16_t kUnusedColumn = 0xFFFF;
// Columns are u16 and 0xFFFF is taken.
constexpr int64_t kMaxInt8HiddenSize = 0xFFFF;
constexpr int64_t kMaxGroups = (kMaxInt8HiddenSize + kGroupSize - 1) / kGroupSize;
constexpr int64_t kMaxOutliers = kMaxInt8HiddenSize / 128;

CHAINFED_HOST_DEVICE static inline int64_t num_groups(int64_t hidden_size) {
  return (hidden_size + kGroupSize - 1) / kGroupSize;
}
CHAINFED_HOST_DEVICE static inline int64_t num_outliers(int64_t hidden_size) {
  return hidden_size < 256 ? 1 : hidden_size / 128;
}
CHAINFED_HOST_DEVICE static inline int64_t scales_offset(int64_t hidden_size) {
  return num_groups(hidden_size) * kGroupSize;
}
CHAINFED_HOST_DEVICE static inline int64_t outliers_offset(int64_t hidden_size) {
  return num_groups(hidden_size) * (kGroupSize + 2);
}

CHAINFED_HOST_DEVICE static inline int64_t int8_record_bytes(int64_t hidden_size) {
  return outliers_offset(hidden_size) + num_outliers(hidden_size) * kOutlierBytes;
}

constexpr uint32_t kMagnitudeMask = 0x7FFFFFFFu;
constexpr uint32_t kInfinityBits = 0x7F800000u;
constexpr uint16_t kInfinityHalf = 0x7C00;
constexpr uint16_t kNanHalf = 0x7E00;

// The smallest f16 >= value; infinity above 65504. value >= 0 and finite.
CHAINFED_HOST_DEVICE static inline uint16_t float_to_f16_up(float value) {
  const uint16_t nearest = float_to_f16(value);
  return f16_to_float(nearest) < value ? static_cast<uint16_t>(nearest + 1) : nearest;
}

struct GroupScale {
  uint16_t half;  // as stored
  float inverse;  // what a value is multiplied by to get its code; 0 when all codes are 0
};

// max_bits: the bits of the largest magnitude of the group. The order of bits is the order of magnitudes, with NaN on
// top, which is why magnitudes are compared as integers throughout.
CHAINFED_HOST_DEVICE static inline GroupScale group_scale(uint32_t max_bits) {
  if (max_bits >= kInfinityBits) return {kNanHalf, 0.0f};
  const uint16_t half = float_to_f16_up(bits_float(max_bits) / 127.0f);
  if (half >= kInfinityHalf) return {kNanHalf, 0.0f};
  return {half, half == 0 ? 0.0f : 1.0f / f16_to_float(half)};
}

CHAINFED_HOST_DEVICE static inline void write_outliers(const float* row, int64_t hidden_size, const uint16_t* columns,
                                                       int64_t count, uint8_t* record) {
  uint8_t* slot = record + outliers_offset(hidden_size);
  for (int64_t i = 0; i < num_outliers(hidden_size); ++i, slot += kOutlierBytes) {
    const uint16_t column = i < count ? columns[i] : kUnusedColumn;
    const float value = i < count ? row[column] : 0.0f;
    std::memcpy(slot, &column, sizeof column);
    std::memcpy(slot + sizeof column, &value, sizeof value);
  }
}

// A record may come from a damaged file: columns outside the row are passed over.
CHAINFED_HOST_DEVICE static inline void patch_outliers(const uint8_t* record, int64_t hidden_size, float* row) {
  const uint8_t* slot = record + outliers_offset(hidden_size);
  for (int64_t i = 0; i < num_outliers(hidden_size); ++i, slot += kOutlierBytes) {
    uint16_t column;
    std::memcpy(&column, slot, sizeof column);
    if (column < hidden_size) std::memcpy(row + column, slot + sizeof column, sizeof(float));
  }
}

}  // namespace chainfed

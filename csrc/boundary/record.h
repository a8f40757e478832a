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

static inline int64_t num_groups(int64_t hidden_size) { return (hidden_size + kGroupSize - 1) / kGroupSize; }
static inline int64_t num_outliers(int64_t hidden_size) { return std::max<int64_t>(1, hidden_size / 128); }
static inline int64_t scales_offset(int64_t hidden_size) { return num_groups(hidden_size) * kGroupSize; }
static inline int64_t outliers_offset(int64_t hidden_size) { return num_groups(hidden_size) * (kGroupSize + 2); }

constexpr uint32_t kMagnitudeMask = 0x7FFFFFFFu;
constexpr uint32_t kInfinityBits = 0x7F800000u;
constexpr uint16_t kNanHalf = 0x7E00;

// The smallest f16 >= value; infinity above 65504. value >= 0 and finite.
static inline uint16_t float_to_f16_up(float value) {
  const uint16_t nearest = float_to_f16(value);
  return f16_to_float(nearest) < value ? static_cast<uint16_t>(nearest + 1) : nearest;
}

struct GroupScale {
  uint16_t half;  // as stored
  float inverse;  // what a value is multiplied by to get its code; 0 when all codes are 0
};

// max_bits: the bits of the largest magnitude of the group. The order of bits is the order of magnitudes, with NaN on
// top, which is why magnitudes are compared as integers throughout.
static inline GroupScale group_scale(uint32_t max_bits) {
  if (max_bits >= kInfinityBits) return {kNanHalf, 0.0f};
  const uint16_t half = float_to_f16_up(bits_float(max_bits) / 127.0f);
  if (half >= 0x7C00) return {kNanHalf, 0.0f};
  return {half, half == 0 ? 0.0f : 1.0f / f16_to_float(half)};
}

// The `capacity` largest (magnitude, then lowest column) of the values offered: a heap with the least on top.
class LargestMagnitudes {
 public:
  explicit LargestMagnitudes(int64_t capacity) : capacity_(capacity) {}

  // Values below this need not be offered.
  uint32_t least_bits() const { return size_ < capacity_ ? 0 : static_cast<uint32_t>(keys_[0] >> 16); }

  void offer(uint32_t magnitude_bits, int64_t column) {
    const uint64_t key = (static_cast<uint64_t>(magnitude_bits) << 16) | static_cast<uint64_t>(0xFFFF - column);
    if (size_ < capacity_) {
      keys_[size_++] = key;
      std::push_heap(keys_, keys_ + size_, greater);
    } else if (key > keys_[0]) {
      replace_least(key);
    }
  }

  // Ascending columns; zeros are left out, for a slot that holds one buys nothing. Returns their number.
  int64_t columns(uint16_t* out) const {
    int64_t count = 0;
    for (int64_t i = 0; i < size_; ++i) {
      if (keys_[i] >> 16 != 0) out[count++] = static_cast<uint16_t>(0xFFFF - (keys_[i] & 0xFFFF));
    }
    std::sort(out, out + count);
    return count;
  }

 private:
  static bool greater(uint64_t a, uint64_t b) { return a > b; }

  void replace_least(uint64_t key) {
    int64_t hole = 0;
    for (;;) {
      int64_t child = 2 * hole + 1;
      if (child >= size_) break;
      if (child + 1 < size_ && keys_[child + 1] < keys_[child]) ++child;
      if (keys_[child] >= key) break;
      keys_[hole] = keys_[child];
      hole = child;
    }
    keys_[hole] = key;
  }

  int64_t capacity_;
  int64_t size_ = 0;
  uint64_t keys_[kMaxOutliers];
};

// The rank-th largest group maximum: at least `rank` values of the token reach it, so the outliers do too.
static inline uint32_t outlier_bound(const uint32_t* group_max_bits, int64_t groups, int64_t rank) {
  uint32_t sorted[kMaxGroups];
  std::copy(group_max_bits, group_max_bits + groups, sorted);
  std::nth_element(sorted, sorted + (rank - 1), sorted + groups, [](uint32_t a, uint32_t b) { return a > b; });
  return sorted[rank - 1];
}

static inline void write_outliers(const float* row, int64_t hidden_size, const uint16_t* columns, int64_t count,
                                  uint8_t* record) {
  uint8_t* slot = record + outliers_offset(hidden_size);
  for (int64_t i = 0; i < num_outliers(hidden_size); ++i, slot += kOutlierBytes) {
    const uint16_t column = i < count ? columns[i] : kUnusedColumn;
    const float value = i < count ? row[column] : 0.0f;
    std::memcpy(slot, &column, sizeof column);
    std::memcpy(slot + sizeof column, &value, sizeof value);
  }
}

// A record may come from a damaged file: columns outside the row are passed over.
static inline void patch_outliers(const uint8_t* record, int64_t hidden_size, float* row) {
  const uint8_t* slot = record + outliers_offset(hidden_size);
  for (int64_t i = 0; i < num_outliers(hidden_size); ++i, slot += kOutlierBytes) {
    uint16_t column;
    std::memcpy(&column, slot, sizeof column);
    if (column < hidden_size) std::memcpy(row + column, slot + sizeof column, sizeof(float));
  }
}

// A group copied out of its row: zero beyond the row's end and in the outliers' places.
static inline void copy_group(const float* row, int64_t hidden_size, int64_t group, const uint16_t* columns,
                              int64_t begin, int64_t end, float* out /*[64]*/) {
  const int64_t first = group * kGroupSize;
  const int64_t width = std::min(kGroupSize, hidden_size - first);
  std::memcpy(out, row + first, static_cast<size_t>(width) * sizeof(float));
  std::fill(out + width, out + kGroupSize, 0.0f);
  for (int64_t i = begin; i < end; ++i) out[columns[i] - first] = 0.0f;
}

}  // namespace chainfed

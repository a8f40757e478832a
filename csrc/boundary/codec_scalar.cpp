#include <cmath>

#include "boundary/codec.h"
#include "boundary/encode_int8-inl.h"

namespace chainfed {
namespace {

struct Scalar {
  static uint32_t max_bits(const float* values) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < kGroupSize; ++i) largest = std::max(largest, float_bits(values[i]) & kMagnitudeMask);
    return largest;
  }
  static void max_bits_of_8(const float* values, uint32_t* out) {
    for (int g = 0; g < 8; ++g) out[g] = max_bits(values + g * kGroupSize);
  }
  static int64_t first_of_largest(const uint32_t* values, int64_t count) {
    return std::max_element(values, values + count) - values;
  }
  static void replace(uint32_t* values, int64_t index, uint32_t value) { values[index] = value; }
  static Taken take(const float* values, uint32_t bits) {
    Taken found = {0, 0};
    for (int64_t i = 0; i < kGroupSize; ++i) {
      const uint32_t magnitude = float_bits(values[i]) & kMagnitudeMask;
      found.equal |= static_cast<uint64_t>(magnitude == bits) << i;
      if (magnitude < bits) found.below = std::max(found.below, magnitude);
    }
    return found;
  }
  static void scales(const uint32_t* max_bits, int64_t count, uint16_t* halves, float* inverse) {
    for (int64_t g = 0; g < count; ++g) {
      const GroupScale scale = group_scale(max_bits[g]);
      halves[g] = scale.half;
      inverse[g] = scale.inverse;
    }
  }
  static void quantize(const float* values, float inverse, int8_t* codes) {
    for (int64_t i = 0; i < kGroupSize; ++i) {
      const float code = std::nearbyint(values[i] * inverse);
      codes[i] = std::fabs(code) <= 127.0f ? static_cast<int8_t>(code) : 0;  // an outlier would overflow the cast
    }
  }
};

}  // namespace

void encode_int8_scalar(const float* rows, int64_t num_tokens, int64_t hidden_size, uint8_t* records) {
  encode_int8_rows<Scalar>(rows, num_tokens, hidden_size, records);
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

void encode_bf16_scalar(const float* rows, int64_t num_tokens, int64_t hidden_size, uint8_t* records) {
  const int64_t count = num_tokens * hidden_size;  // records follow one another without a gap, as rows do
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t half = float_to_bf16(rows[i]);
    std::memcpy(records + 2 * i, &half, sizeof half);
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

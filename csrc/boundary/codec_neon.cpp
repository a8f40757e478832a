#include <arm_neon.h>

#include "boundary/codec.h"
#include "boundary/encode_int8-inl.h"

namespace chainfed {
namespace {

uint32x4_t load_magnitudes(const float* values) {
  return vandq_u32(vreinterpretq_u32_f32(vld1q_f32(values)), vdupq_n_u32(kMagnitudeMask));
}

uint32x4_t lane_bits() {
  static constexpr uint32_t kBits[4] = {1, 2, 4, 8};
  return vld1q_u32(kBits);
}

struct Neon {
  static uint32_t max_bits(const float* values) {
    uint32x4_t low = load_magnitudes(values), high = load_magnitudes(values + 4);
    for (int64_t i = 8; i < kGroupSize; i += 8) {
      low = vmaxq_u32(low, load_magnitudes(values + i));
      high = vmaxq_u32(high, load_magnitudes(values + i + 4));
    }
    return vmaxvq_u32(vmaxq_u32(low, high));
  }
  static void max_bits_of_8(const float* values, uint32_t* out) {
    for (int g = 0; g < 8; ++g) out[g] = max_bits(values + g * kGroupSize);
  }
  static int64_t first_of_largest(const uint32_t* values, int64_t count) {
    uint32x4_t largest = vld1q_u32(values);
    for (int64_t i = 4; i < count; i += 4) largest = vmaxq_u32(largest, vld1q_u32(values + i));
    const uint32x4_t wanted = vdupq_n_u32(vmaxvq_u32(largest));
    for (int64_t i = 0;; i += 4) {
      const uint32_t mask = vaddvq_u32(vandq_u32(vceqq_u32(vld1q_u32(values + i), wanted), lane_bits()));
      if (mask != 0) return i + __builtin_ctz(mask);
    }
  }
  static void replace(uint32_t* values, int64_t index, uint32_t value) { values[index] = value; }
  static Taken take(const float* values, uint32_t bits) {
    const uint32x4_t wanted = vdupq_n_u32(bits);
    uint32x4_t below = vdupq_n_u32(0);
    uint64_t equal = 0;
    for (int64_t i = 0; i < kGroupSize; i += 4) {
      const uint32x4_t value = load_magnitudes(values + i);
      equal |= static_cast<uint64_t>(vaddvq_u32(vandq_u32(vceqq_u32(value, wanted), lane_bits()))) << i;
      below = vmaxq_u32(below, vandq_u32(value, vcltq_u32(value, wanted)));
    }
    return {equal, vmaxvq_u32(below)};
  }
  // One conversion a group of 64 values; rounding upwards has no instruction of its own.
  static void scales(const uint32_t* max_bits, int64_t count, uint16_t* halves, float* inverse) {
    for (int64_t g = 0; g < count; ++g) {
      const GroupScale scale = group_scale(max_bits[g]);
      halves[g] = scale.half;
      inverse[g] = scale.inverse;
    }
  }
  static void quantize(const float* values, float inverse, int8_t* codes) {
    for (int64_t i = 0; i < kGroupSize; i += 16) {
      int32x4_t q[4];
      for (int k = 0; k < 4; ++k) q[k] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(values + i + 4 * k), inverse));
      const int16x8_t low = vcombine_s16(vqmovn_s32(q[0]), vqmovn_s32(q[1]));
      const int16x8_t high = vcombine_s16(vqmovn_s32(q[2]), vqmovn_s32(q[3]));
      vst1q_s8(codes + i, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
    }
  }
};

}  // namespace

void encode_int8_neon(const float* rows, int64_t num_tokens, int64_t hidden_size, uint8_t* records) {
  encode_int8_rows<Neon>(rows, num_tokens, hidden_size, records);
}

void decode_int8_row_neon(const uint8_t* record, int64_t hidden_size, float* row) {
  const uint8_t* scales = record + scales_offset(hidden_size);
  const int64_t whole = hidden_size / kGroupSize * kGroupSize;
  for (int64_t first = 0; first < hidden_size; first += kGroupSize) {
    uint16_t half;
    std::memcpy(&half, scales + first / kGroupSize * 2, sizeof half);
    const float scale = f16_to_float(half);
    float tail[kGroupSize];
    float* out = first < whole ? row + first : tail;
    for (int64_t i = 0; i < kGroupSize; i += 8) {
      const int16x8_t codes = vmovl_s8(vld1_s8(reinterpret_cast<const int8_t*>(record + first + i)));
      vst1q_f32(out + i, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(codes))), scale));
      vst1q_f32(out + i + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_high_s16(codes))), scale));
    }
    if (first == whole) std::memcpy(row + first, tail, static_cast<size_t>(hidden_size - whole) * sizeof(float));
  }
  patch_outliers(record, hidden_size, row);
}

void encode_bf16_neon(const float* rows, int64_t num_tokens, int64_t hidden_size, uint8_t* records) {
  const int64_t count = num_tokens * hidden_size;  // records follow one another without a gap, as rows do
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const uint32x4_t bits = vreinterpretq_u32_f32(vld1q_f32(rows + i));
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd);
    const uint32x4_t is_nan = vcgtq_u32(load_magnitudes(rows + i), vdupq_n_u32(kInfinityBits));
    const uint32x4_t chosen = vbslq_u32(is_nan, vorrq_u32(bits, vdupq_n_u32(0x400000)), rounded);
    vst1_u8(records + 2 * i, vreinterpret_u8_u16(vshrn_n_u32(chosen, 16)));
  }
  encode_bf16_scalar(rows + i, 1, count - i, records + 2 * i);
}

void decode_bf16_row_neon(const uint8_t* record, int64_t hidden_size, float* row) {
  int64_t i = 0;
  for (; i + 4 <= hidden_size; i += 4) {
    const uint16x4_t halves = vreinterpret_u16_u8(vld1_u8(record + 2 * i));
    vst1q_f32(row + i, vreinterpretq_f32_u32(vshll_n_u16(halves, 16)));
  }
  decode_bf16_row_scalar(record + 2 * i, hidden_size - i, row + i);
}

}  // namespace chainfed

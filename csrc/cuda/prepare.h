// Activations for the tensor cores. Prepare: f32 [M, length] to f16 [M, cols] in the order of tile_codec.h, cols a
// multiple of 64, zeros beyond length, each row divided by a power of two (row_scale) that puts its largest magnitude
// between 2^14 and 2^15. So no row overflows a half, nothing is rounded by the scaling, and what lies within 2^-28 of
// the row's largest value keeps the half's full 11 bits, gradients of 1e-9 included. A row with a value that is not
// finite gets zeros and the scale NaN: its results are NaN, and no other's.
#pragma once
#include <cstdint>

#include "cuda/tile_codec.h"

namespace chainfed::cuda {

// The largest of each thread's values, for all threads of a block. shared: 32 words.
CHAINFED_DEVICE uint32_t block_max(uint32_t value, uint32_t* shared) {
  value = warp_max(value);
  if (thread_index() % kWarp == 0) shared[thread_index() / kWarp] = value;
  sync_threads();
  for (int i = 0; i < num_threads() / kWarp; ++i) value = shared[i] > value ? shared[i] : value;
  sync_threads();
  return value;
}

CHAINFED_DEVICE float warp_sum(float value) {
  for (int mask = 16; mask > 0; mask >>= 1) value += warp_xor(value, mask);
  return value;
}

CHAINFED_DEVICE float block_sum(float value, float* shared) {
  value = warp_sum(value);
  if (thread_index() % kWarp == 0) shared[thread_index() / kWarp] = value;
  sync_threads();
  float sum = 0;
  for (int i = 0; i < num_threads() / kWarp; ++i) sum += shared[i];
  sync_threads();
  return sum;
}

constexpr uint32_t kMagnitude = 0x7FFFFFFFu, kInfinity = 0x7F800000u;

// The power of two to divide a row by whose largest magnitude has these bits.
CHAINFED_HOST_DEVICE inline float row_scale_of(uint32_t max_bits) {
  if (max_bits >= kInfinity) return bits_float(0x7FC00000u);
  if (max_bits == 0) return 1.0f;
  int exponent = static_cast<int>(max_bits >> 23) - 14;
  if (exponent < 15) exponent = 15;  // 2^-112: its inverse is still a float
  return bits_float(static_cast<uint32_t>(exponent) << 23);
}

struct PrepareArgs {
  const float* x;  // [M, length]
  int64_t num_tokens, length, cols;
  Direction direction;
  uint16_t* out;     // [M, cols]
  float* row_scale;  // [M]
};

struct Prepare {
  using Args = PrepareArgs;
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 128;
  static Grid grid(int64_t num_tokens) { return {num_tokens, 1, 1}; }

  CHAINFED_DEVICE static void run(const Args& a, unsigned char* shared) {
    const float* row = a.x + block_x() * a.length;
    uint32_t largest = 0;
    for (int64_t i = thread_index(); i < a.length; i += kThreads) {
      const uint32_t bits = float_bits(row[i]) & kMagnitude;
      largest = bits > largest ? bits : largest;
    }
    largest = block_max(largest, reinterpret_cast<uint32_t*>(shared));
    const float scale = row_scale_of(largest);
    if (thread_index() == 0) a.row_scale[block_x()] = scale;
    const float inverse = largest >= kInfinity ? 0.0f : 1.0f / scale;
    auto* out = reinterpret_cast<uint32_t*>(a.out + block_x() * a.cols);
    for (int64_t i = thread_index(); i < a.cols / 2; i += kThreads) {
      const int64_t first = i / 16 * 32;
      const int position = static_cast<int>(i % 16) * 2;
      out[i] = halves(value(a, row, first + source_of_position(a.direction, position), inverse),
                      value(a, row, first + source_of_position(a.direction, position + 1), inverse));
    }
  }

 private:
  CHAINFED_DEVICE static float value(const Args& a, const float* row, int64_t index, float inverse) {
    return index < a.length && inverse != 0.0f ? row[index] * inverse : 0.0f;  // infinity * 0 would be NaN
  }
};

// f32 [M, length] to bf16 [M, stride], a multiple of 8, zeros beyond length: the activations of the library product. A
// thread converts four values, read at once where rows allow it.
struct ToBf16 {
  struct Args {
    const float* x;
    int64_t length, stride;
    uint16_t* out;
  };
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 0;
  static Grid grid(int64_t num_tokens) { return {num_tokens, 1, 1}; }
  CHAINFED_DEVICE static void run(const Args& a, unsigned char*) {
    const float* row = a.x + block_x() * a.length;
    auto* out = reinterpret_cast<Uint2*>(a.out + block_x() * a.stride);
    const bool aligned = a.length % 4 == 0 && reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
    for (int64_t i = thread_index(); i < a.stride / 4; i += kThreads) {
      float v[4];
      if (aligned && 4 * i < a.length) {
        const Uint4 bits = reinterpret_cast<const Uint4*>(row)[i];
        v[0] = bits_float(bits.x), v[1] = bits_float(bits.y), v[2] = bits_float(bits.z), v[3] = bits_float(bits.w);
      } else {
        for (int e = 0; e < 4; ++e) v[e] = 4 * i + e < a.length ? row[4 * i + e] : 0.0f;
      }
      out[i] = {bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3])};
    }
  }
};

// out[t] = bias (or += bias), rows `stride` apart.
struct BiasRows {
  struct Args {
    const float* bias;  // [N]
    int64_t num_outputs;
    float* out;
    int64_t stride;
    bool accumulate;
  };
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 0;
  static Grid grid(int64_t num_tokens) { return {num_tokens, 1, 1}; }
  CHAINFED_DEVICE static void run(const Args& a, unsigned char*) {
    float* out = a.out + block_x() * a.stride;
    for (int64_t i = thread_index(); i < a.num_outputs; i += kThreads) {
      out[i] = a.accumulate ? out[i] + a.bias[i] : a.bias[i];
    }
  }
};

}  // namespace chainfed::cuda

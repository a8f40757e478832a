// The adapter with one token a vector lane: both products become broadcasts of a weight times a vector of tokens, so
// no sum crosses lanes and a token's result is the same whoever shares its vector. Included only by the files of one
// instruction set each, which define Lanes: Vector, kCount, load, store, zero, multiply_add(weight, x, sum).
// Sums run in blocks of kInputBlock inputs, which keeps the rounding error of long rows near that of a short one.
#pragma once
#include <algorithm>
#include <cstdint>

#include "boundary/adapter.h"

namespace chainfed {
namespace {

constexpr int64_t kInputBlock = 256;
constexpr int64_t kSums = 8;  // independent sums in flight hide the latency of the multiply-add

// out[i] (a vector of tokens each) += sum over k of weight[i, k] * inputs[k], for num_rows rows and count inputs.
template <typename Lanes>
void accumulate_rows(const float* weight, int64_t stride, int64_t num_rows, const float* inputs, int64_t count,
                     float* out) {
  constexpr int64_t L = Lanes::kCount;
  int64_t row = 0;
  for (; row + kSums <= num_rows; row += kSums) {
    typename Lanes::Vector sums[kSums];
    for (int64_t i = 0; i < kSums; ++i) sums[i] = Lanes::zero();
    const float* w = weight + row * stride;
    for (int64_t k = 0; k < count; ++k) {
      const typename Lanes::Vector x = Lanes::load(inputs + k * L);
      for (int64_t i = 0; i < kSums; ++i) sums[i] = Lanes::multiply_add(w[i * stride + k], x, sums[i]);
    }
    for (int64_t i = 0; i < kSums; ++i)
      Lanes::store(out + (row + i) * L, Lanes::add(Lanes::load(out + (row + i) * L), sums[i]));
  }
  for (; row < num_rows; ++row) {
    typename Lanes::Vector sum = Lanes::zero();
    for (int64_t k = 0; k < count; ++k) {
      sum = Lanes::multiply_add(weight[row * stride + k], Lanes::load(inputs + k * L), sum);
    }
    Lanes::store(out + row * L, Lanes::add(Lanes::load(out + row * L), sum));
  }
}

template <typename Lanes>
void apply_adapter_lanes(const BottleneckView& adapter, const float* hidden, int64_t num_tokens, int64_t hidden_size,
                         float* out) {
  constexpr int64_t L = Lanes::kCount;
  alignas(64) float middle[kMaxAdapterWidth * L];  // [R][L]
  alignas(64) float block[kInputBlock * L];        // [inputs or outputs][L]
  const int64_t width = adapter.width;
  for (int64_t r = 0; r < width; ++r) std::fill(middle + r * L, middle + (r + 1) * L, adapter.down_bias[r]);
  for (int64_t first = 0; first < hidden_size; first += kInputBlock) {
    const int64_t count = std::min(kInputBlock, hidden_size - first);
    if (num_tokens < L) std::fill(block, block + count * L, 0.0f);
    for (int64_t t = 0; t < num_tokens; ++t) {
      const float* h = hidden + t * hidden_size + first;
      for (int64_t i = 0; i < count; ++i) block[i * L + t] = h[i];
    }
    accumulate_rows<Lanes>(adapter.down_weight + first, hidden_size, width, block, count, middle);
  }
  for (int64_t i = 0; i < width * L; ++i) middle[i] = gelu(middle[i]);
  for (int64_t first = 0; first < hidden_size; first += kInputBlock) {
    const int64_t count = std::min(kInputBlock, hidden_size - first);
    for (int64_t i = 0; i < count; ++i) std::fill(block + i * L, block + (i + 1) * L, adapter.up_bias[first + i]);
    for (int64_t r = 0; r < width; r += kInputBlock) {
      accumulate_rows<Lanes>(adapter.up_weight + first * width + r, width, count, middle + r * L,
                             std::min(kInputBlock, width - r), block);
    }
    for (int64_t t = 0; t < num_tokens; ++t) {
      const float* h = hidden + t * hidden_size + first;
      float* y = out + t * hidden_size + first;
      for (int64_t i = 0; i < count; ++i) y[i] = h[i] + block[i * L + t];
    }
  }
}

}  // namespace
}  // namespace chainfed

// The head's steps between the two products: logits of a tile of vocabulary rows become softmax weights, online.
#pragma once
#include <cstdint>

#include "cuda/prepare.h"

namespace chainfed::cuda {

// Weights are at most 1; as halves they are stored 2^14 times as large, so that 2^-38 is still told from nothing.
constexpr float kWeightScale = 16384.0f;

// Where the weights go; none: only the sums are wanted.
enum class WeightsAs : uint8_t { none, floats, halves, bf16 };

// One token a block. Folds logits [M, num_rows] of vocabulary rows first_row.. into running_max and running_sum, notes
// the target's logit, and leaves exp(z - new max), 0 for the target (finish adds its part exactly):
//   halves  as f16 in the order of the grad product, [M, cols], zeros beyond num_rows, times kWeightScale
//   bf16    as bf16 row-major, [M, cols], zeros beyond num_rows
//   floats  in place of the logits
// With grad, multiplies the token's gradient by exp(old max - new max). A row with a NaN, or whose maximum is not
// finite, gets running_max = running_sum = NaN for good and weights of zero.
struct SoftmaxTile {
  struct Args {
    float* logits;
    int64_t num_rows, first_row;
    const int64_t* targets;
    float *running_max, *running_sum, *target_logit;
    WeightsAs as;
    uint16_t* packed;  // halves or bf16
    int64_t cols;
    float* row_scale;  // [M], set to 1 / kWeightScale; with halves
    float* grad;       // [M, hidden_size] or null
    int64_t hidden_size;
  };
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 256;
  static Grid grid(int64_t num_tokens) { return {num_tokens, 1, 1}; }

  CHAINFED_DEVICE static void run(const Args& a, unsigned char* shared) {
    const int64_t token = block_x();
    float* z = a.logits + token * a.num_rows;
    auto* words = reinterpret_cast<uint32_t*>(shared);
    const float old_max = a.running_max[token], old_sum = a.running_sum[token];
    const int64_t target = a.targets[token] - a.first_row;
    const float new_max = row_max(a, z, old_max, words);
    const bool dead = !(old_sum == old_sum) || (float_bits(new_max) & kMagnitude) >= kInfinity;
    if (thread_index() == 0 && target >= 0 && target < a.num_rows) a.target_logit[token] = z[target];
    sync_threads();  // the target's logit is read before its place is overwritten
    const float sum = block_sum(weigh(a, z, target, dead, new_max), reinterpret_cast<float*>(shared));
    const float keep = exponential(old_max - new_max);
    if (thread_index() == 0) {
      const float nan = bits_float(0x7FC00000u);
      a.running_max[token] = dead ? nan : new_max;
      a.running_sum[token] = dead ? nan : old_sum * keep + sum;
      if (a.as == WeightsAs::halves) a.row_scale[token] = 1.0f / kWeightScale;
    }
    if (a.grad == nullptr || dead || keep == 1.0f) return;
    for (int64_t i = thread_index(); i < a.hidden_size; i += kThreads) a.grad[token * a.hidden_size + i] *= keep;
  }

 private:
  // Floats in the order of their values: negative ones turned over, the others above them; a NaN of either sign on top.
  CHAINFED_DEVICE static uint32_t ordered(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & kMagnitude) > kInfinity) return 0xFFFFFFFFu;
    return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  }

  CHAINFED_DEVICE static float row_max(const Args& a, const float* z, float old_max, uint32_t* shared) {
    uint32_t largest = ordered(old_max);
    for (int64_t i = thread_index(); i < a.num_rows; i += kThreads) {
      const uint32_t value = ordered(z[i]);
      largest = value > largest ? value : largest;
    }
    largest = block_max(largest, shared);
    if (largest == 0xFFFFFFFFu) return bits_float(0x7FC00000u);
    return bits_float(largest >> 31 != 0 ? largest & kMagnitude : ~largest);
  }

  // This thread's part of the sum; writes its weights.
  CHAINFED_DEVICE static float weigh(const Args& a, float* z, int64_t target, bool dead, float max) {
    float sum = 0;
    if (a.as == WeightsAs::none || a.as == WeightsAs::floats) {
      for (int64_t i = thread_index(); i < a.num_rows; i += kThreads) {
        const float weight = dead ? 0.0f : exponential(z[i] - max);
        sum += weight;
        if (a.as == WeightsAs::floats) z[i] = i == target ? 0.0f : weight;
      }
      return sum;
    }
    const bool in_tile_order = a.as == WeightsAs::halves;
    auto* out = reinterpret_cast<uint32_t*>(a.packed + block_x() * a.cols);
    for (int64_t i = thread_index(); i < a.cols / 2; i += kThreads) {
      float weights[2];
      for (int e = 0; e < 2; ++e) {
        const int position = static_cast<int>(i % 16) * 2 + e;
        const int64_t row = i / 16 * 32 + (in_tile_order ? source_of_position(Direction::grad, position) : position);
        weights[e] = dead || row >= a.num_rows ? 0.0f : exponential(z[row] - max);
        sum += weights[e];
        if (row == target) weights[e] = 0.0f;
      }
      out[i] = in_tile_order ? halves(weights[0] * kWeightScale, weights[1] * kWeightScale)
                             : bf16_pair(weights[0], weights[1]);
    }
    return sum;
  }
};

// loss[t] = max + log(sum) - target_logit, and the gradient's end (kernels.h, cross_entropy_finish).
struct FinishLoss {
  using Args = FinishCall;
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 0;
  static Grid grid(int64_t num_tokens) { return {num_tokens, 1, 1}; }
  CHAINFED_DEVICE static void run(const Args& a, unsigned char*) {
    const int64_t t = block_x();
    const float max = a.running_max[t], sum = a.running_sum[t], target = a.target_logit[t];
    if (thread_index() == 0) a.loss[t] = max + logarithm(sum) - target;
    if (a.grad == nullptr) return;
    const float weight = a.token_weight == nullptr ? 1.0f : a.token_weight[t];
    const float scale = weight / sum, target_scale = weight * (exponential(target - max) / sum - 1.0f);
    float* grad = a.grad + t * a.hidden_size;
    const float* row = a.target_row + t * a.hidden_size;
    for (int64_t i = thread_index(); i < a.hidden_size; i += kThreads)
      grad[i] = grad[i] * scale + target_scale * row[i];
  }
};

}  // namespace chainfed::cuda

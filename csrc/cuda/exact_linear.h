// The product in f32 throughout, for every block format: the mode that is held to 1e-6 of float64 (activation "f32"),
// and the gradient's own where the caller asks for it. 64 x 64 results a block, 4 x 4 a thread; both operands pass
// through shared memory as f32. Sums run in blocks of kSumBlock products, which keeps the rounding error of a long row
// near that of a short one.
#pragma once
#include <cstdint>

#include "cuda/weights.h"

namespace chainfed::cuda {

struct ExactLinearArgs {
  MatrixView w;
  int64_t tiles_per_row;
  const float* x;     // [M, summed]
  const float* bias;  // [outputs] or null
  float* out;         // [M, outputs]
  int64_t num_tokens;
  int64_t x_stride;  // elements between rows of x
  bool accumulate;
};

template <Direction kDirection>
struct ExactLinear {
  using Args = ExactLinearArgs;
  static constexpr int kThreads = 256, kMinBlocks = 2, kTile = 64, kStep = 16, kSumBlock = 256;
  static constexpr int kStride = kTile + 4;  // rows of shared memory, against bank conflicts
  static constexpr int kSharedBytes = 2 * kStep * kStride * 4;

  static Grid grid(int64_t num_tokens, int64_t num_outputs) {
    return {(num_tokens + kTile - 1) / kTile, (num_outputs + kTile - 1) / kTile, 1};
  }

  CHAINFED_DEVICE static void run(const Args& a, unsigned char* shared) {
    auto* x = reinterpret_cast<float*>(shared);  // [kStep][kTile]: summed index, token
    float* w = x + kStep * kStride;              // [kStep][kTile]: summed index, output
    const bool forward = kDirection == Direction::forward;
    const int64_t summed = forward ? a.w.num_cols : a.w.num_rows, outputs = forward ? a.w.num_rows : a.w.num_cols;
    const int64_t token0 = block_x() * kTile, output0 = block_y() * kTile;
    float total[4][4] = {}, block[4][4] = {};
    for (int64_t first = 0; first < summed; first += kStep) {
      sync_threads();
      for (int i = thread_index(); i < kStep * kTile; i += kThreads) {
        load(a, i, first, summed, token0, output0, outputs, x, w);
      }
      sync_threads();
      accumulate(x, w, block);
      if ((first + kStep) % kSumBlock == 0 || first + kStep >= summed) fold(block, total);
    }
    store(a, total, token0, output0, outputs);
  }

 private:
  // Neighbouring threads read neighbouring addresses: along a row of x, and along the rows of W.
  CHAINFED_DEVICE static void load(const Args& a, int i, int64_t first, int64_t summed, int64_t token0, int64_t output0,
                                   int64_t outputs, float* x, float* w) {
    const int step = i % kStep, row = i / kStep;
    const bool in_x = first + step < summed && token0 + row < a.num_tokens;
    x[step * kStride + row] = in_x ? a.x[(token0 + row) * a.x_stride + first + step] : 0.0f;
    if constexpr (kDirection == Direction::forward) {
      const bool inside = first + step < summed && output0 + row < outputs;
      w[step * kStride + row] = inside ? weight_at(a.w, a.tiles_per_row, output0 + row, first + step) : 0.0f;
    } else {
      const int output = i % kTile, index = i / kTile;
      const bool inside = first + index < summed && output0 + output < outputs;
      w[index * kStride + output] = inside ? weight_at(a.w, a.tiles_per_row, first + index, output0 + output) : 0.0f;
    }
  }

  CHAINFED_DEVICE static void accumulate(const float* x, const float* w, float (&block)[4][4]) {
    const int m = thread_index() / 16 * 4, n = thread_index() % 16 * 4;
    CHAINFED_UNROLL
    for (int step = 0; step < kStep; ++step) {
      float left[4], right[4];
      CHAINFED_UNROLL
      for (int i = 0; i < 4; ++i) {
        left[i] = x[step * kStride + m + i];
        right[i] = w[step * kStride + n + i];
      }
      CHAINFED_UNROLL
      for (int i = 0; i < 4; ++i) {
        CHAINFED_UNROLL
        for (int j = 0; j < 4; ++j) block[i][j] = multiply_add(left[i], right[j], block[i][j]);
      }
    }
  }

  CHAINFED_DEVICE static void fold(float (&block)[4][4], float (&total)[4][4]) {
    CHAINFED_UNROLL
    for (int i = 0; i < 4; ++i) {
      CHAINFED_UNROLL
      for (int j = 0; j < 4; ++j) {
        total[i][j] += block[i][j];
        block[i][j] = 0.0f;
      }
    }
  }

  CHAINFED_DEVICE static void store(const Args& a, const float (&total)[4][4], int64_t token0, int64_t output0,
                                    int64_t outputs) {
    CHAINFED_UNROLL
    for (int i = 0; i < 4; ++i) {
      CHAINFED_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int64_t token = token0 + thread_index() / 16 * 4 + i, output = output0 + thread_index() % 16 * 4 + j;
        if (token >= a.num_tokens || output >= outputs) continue;
        float* to = a.out + token * outputs + output;
        const float value = total[i][j] + (a.bias != nullptr ? a.bias[output] : 0.0f);
        *to = a.accumulate ? *to + value : value;
      }
    }
  }
};

}  // namespace chainfed::cuda

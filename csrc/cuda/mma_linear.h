// The fused quantised product on tensor cores: codes go from memory to registers and become halves there; no decoded
// weight is ever written. One body serves both directions (Direction):
//   forward  out[m, n] = sum over k of x[m, k] W[n, k]           outputs: rows of W, summed: columns
//   grad     out[m, k] = sum over n of g[m, n] W[n, k]           outputs: columns of W, summed: rows
// Enters: activations f16 [M, activation_cols] in the order of tile_codec.h, zero beyond the summed length, and their
// row scales (prepare.h); the matrix's tiles as they lie on disk. Leaves: f32 [M, outputs], or one such array of
// partial sums a split (blockIdx.z), to be added by SumSplits.
//
// A block computes kTokens x kOutputs in steps of 64 summed indices, kStages steps in flight by cp.async. A warp
// computes 16 kFragments tokens x 64 outputs. Shared memory a stage: activations [2][kTokens][32] halves (64 bytes a
// row: two rows fill the banks exactly), the rectangle of tiles, its scales. Neither needs padding or swizzling: the 32
// words of a tile are what the 32 lanes read.
#pragma once
#include <cstdint>

#include "cuda/tile_codec.h"

namespace chainfed::cuda {

struct MmaLinearArgs {
  const unsigned char* codes;   // of the tile in the matrix's first row of tiles and column 0
  const unsigned char* scales;  // likewise
  int64_t tiles_per_row, num_row_tiles;
  const uint16_t* activations;  // [M, activation_cols]
  int64_t activation_cols;      // a multiple of 64
  const float* row_scale;       // [M]
  const float* bias;            // [outputs] or null
  float* out;                   // [M, outputs]; with splits: partial sums [splits, M, outputs], neither scale nor bias
  int64_t num_tokens, num_outputs;
  int64_t steps_per_split;
  bool is_split, accumulate;  // accumulate: out += instead of out =
};

template <BlockFormat Format, Direction kDirection, int kFragments, int kWarpsM, int kWarpsN, int kStages>
struct MmaLinear {
  using Args = MmaLinearArgs;
  using Traits = TileTraits<Format>;
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarp;
  static constexpr int kMinBlocks = 1;
  static constexpr int kTokens = 16 * kFragments * kWarpsM, kOutputs = 64 * kWarpsN, kStep = 64;
  // The rectangle of tiles of a step.
  static constexpr int kTileRows = kDirection == Direction::forward ? kOutputs / 8 : kStep / 8;
  static constexpr int kTileCols = kDirection == Direction::forward ? kStep / 32 : kOutputs / 32;
  static constexpr int kScaleCols = kTileCols / Traits::kScaleTiles;
  static constexpr int kActivationBytes = kTokens * kStep * 2;
  static constexpr int kCodeBytes = kTileRows * kTileCols * Traits::kTileBytes;
  static constexpr int kScaleBytes = kTileRows * kScaleCols * Traits::kScaleBytes;
  static constexpr int kStageBytes = kActivationBytes + kCodeBytes + kScaleBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + 4 * Traits::kTableWords;

  static Grid grid(int64_t num_tokens, int64_t num_outputs, int64_t splits) {
    // Tokens vary fastest: blocks that run together share their tiles, which then come from memory once.
    return {(num_tokens + kTokens - 1) / kTokens, (num_outputs + kOutputs - 1) / kOutputs, splits};
  }

  CHAINFED_DEVICE static void run(const Args& a, unsigned char* shared) {
    auto* table = reinterpret_cast<uint32_t*>(shared + kStages * kStageBytes);
    if constexpr (Traits::kTableWords > 0) fill_nf4_pair_table(table);  // seen after the first sync_threads
    const int64_t first_step = block_z() * a.steps_per_split;
    int64_t num_steps = a.activation_cols / kStep - first_step;
    if (num_steps > a.steps_per_split) num_steps = a.steps_per_split;
    float sums[kFragments][8][4] = {};
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < num_steps) load_step(a, first_step + i, shared + i * kStageBytes);
      copy_async_commit();
    }
    for (int64_t i = 0; i < num_steps; ++i) {
      copy_async_wait<kStages - 2>();
      sync_threads();  // step i is there for all, and nobody reads step i - 1 any more
      const int64_t next = i + kStages - 1;
      if (next < num_steps) load_step(a, first_step + next, shared + next % kStages * kStageBytes);
      copy_async_commit();
      multiply_step(shared + i % kStages * kStageBytes, table, sums);
    }
    store(a, sums);
  }

 private:
  CHAINFED_DEVICE static void load_step(const Args& a, int64_t step, unsigned char* stage) {
    const int64_t first_token = block_x() * kTokens;
    for (int i = thread_index(); i < kActivationBytes / 16; i += kThreads) {
      const int piece = i % 4, row = i / 4 % kTokens, slab = i / (4 * kTokens);
      const bool valid = first_token + row < a.num_tokens;
      const int64_t token = valid ? first_token + row : 0;
      const uint16_t* from = a.activations + token * a.activation_cols + step * kStep + slab * 32 + piece * 8;
      copy_async16(stage + i * 16, from, valid);
    }
    const bool forward = kDirection == Direction::forward;
    const int64_t row0 = forward ? block_y() * kTileRows : step * kTileRows;
    const int64_t col0 = forward ? step * kTileCols : block_y() * kTileCols;
    load_rectangle<kTileCols, Traits::kTileBytes>(a.codes, row0, col0, a.num_row_tiles, a.tiles_per_row,
                                                  stage + kActivationBytes);
    load_rectangle<kScaleCols, Traits::kScaleBytes>(a.scales, row0, col0 / Traits::kScaleTiles, a.num_row_tiles,
                                                    a.tiles_per_row / Traits::kScaleTiles,
                                                    stage + kActivationBytes + kCodeBytes);
  }

  // Items of kBytes, [num_rows, num_cols] in memory: kTileRows x kCols of them, zeros where there are none.
  template <int kCols, int kBytes>
  CHAINFED_DEVICE static void load_rectangle(const unsigned char* base, int64_t row0, int64_t col0, int64_t num_rows,
                                             int64_t num_cols, unsigned char* to) {
    constexpr int kPieces = kBytes / 16;
    for (int i = thread_index(); i < kTileRows * kCols * kPieces; i += kThreads) {
      const int64_t row = row0 + i / (kCols * kPieces), col = col0 + i / kPieces % kCols;
      const bool valid = row < num_rows && col < num_cols;
      const unsigned char* from = base + (valid ? (row * num_cols + col) * kBytes + i % kPieces * 16 : 0);
      copy_async16(to + i * 16, from, valid);
    }
  }

  CHAINFED_DEVICE static void multiply_step(const unsigned char* stage, const uint32_t* table,
                                            float (&sums)[kFragments][8][4]) {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    const unsigned char* tiles = stage + kActivationBytes;
    const unsigned char* scales = tiles + kCodeBytes;
    CHAINFED_UNROLL
    for (int slab = 0; slab < 2; ++slab) {
      uint32_t weights[8][4];
      if constexpr (kDirection == Direction::forward) {
        forward_weights(tiles, scales, slab, warp % kWarpsN, lane, table, weights);
      } else {
        grad_weights(tiles, scales, slab, warp % kWarpsN, lane, table, weights);
      }
      const int row0 = warp / kWarpsN * kFragments * 16 + lane / 4;
      const unsigned char* rows = stage + slab * kTokens * 64 + lane % 4 * 16;
      CHAINFED_UNROLL
      for (int f = 0; f < kFragments; ++f) {
        const Uint4 upper = *reinterpret_cast<const Uint4*>(rows + (row0 + f * 16) * 64);
        const Uint4 lower = *reinterpret_cast<const Uint4*>(rows + (row0 + f * 16 + 8) * 64);
        const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
        CHAINFED_UNROLL
        for (int c = 0; c < 8; ++c) mma_f16(sums[f][c], first, {weights[c][0], weights[c][1]});
        CHAINFED_UNROLL
        for (int c = 0; c < 8; ++c) mma_f16(sums[f][c], second, {weights[c][2], weights[c][3]});
      }
    }
  }

  CHAINFED_DEVICE static void forward_weights(const unsigned char* tiles, const unsigned char* scales, int slab,
                                              int warp_n, int lane, const uint32_t* table, uint32_t (&weights)[8][4]) {
    CHAINFED_UNROLL
    for (int c = 0; c < 8; ++c) {
      const int row = warp_n * 8 + c;
      const unsigned char* block = scales + (row * kScaleCols + slab / Traits::kScaleTiles) * Traits::kScaleBytes;
      const ScalePair s = scales_of_row<Format>(block, lane / 4);
      forward_fragment<Format>(tiles + (row * kTileCols + slab) * Traits::kTileBytes, s, lane, table, weights[c]);
    }
  }

  // A step's 64 rows are two slabs of four tiles; a lane's columns lie in one of the warp's two tiles.
  CHAINFED_DEVICE static void grad_weights(const unsigned char* tiles, const unsigned char* scales, int slab,
                                           int warp_n, int lane, const uint32_t* table, uint32_t (&weights)[8][4]) {
    const int col = warp_n * 2 + lane / 16;
    CHAINFED_UNROLL
    for (int pair = 0; pair < 4; ++pair) {
      const int row = slab * 4 + pair;
      const unsigned char* block = scales + (row * kScaleCols + col / Traits::kScaleTiles) * Traits::kScaleBytes;
      const ScalePair s = scales_of_two_rows<Format>(block, lane % 4 * 2);
      uint32_t values[8];
      grad_fragment<Format>(tiles + (row * kTileCols + col) * Traits::kTileBytes, s, lane, table, values);
      CHAINFED_UNROLL
      for (int c = 0; c < 8; ++c) weights[c][pair] = values[c];
    }
  }

  CHAINFED_DEVICE static void store(const Args& a, const float (&sums)[kFragments][8][4]) {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    const int64_t output0 = block_y() * kOutputs + warp % kWarpsN * 64;
    float* out = a.is_split ? a.out + block_z() * a.num_tokens * a.num_outputs : a.out;
    CHAINFED_UNROLL
    for (int f = 0; f < kFragments; ++f) {
      CHAINFED_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t token = block_x() * kTokens + (warp / kWarpsN * kFragments + f) * 16 + half * 8 + lane / 4;
        if (token >= a.num_tokens) continue;
        const float scale = a.is_split ? 1.0f : a.row_scale[token];
        CHAINFED_UNROLL
        for (int c = 0; c < 8; ++c) {
          CHAINFED_UNROLL
          for (int e = 0; e < 2; ++e) {
            const int64_t output = output0 + output_of_fragment(kDirection, c, lane % 4 * 2 + e);
            if (output >= a.num_outputs) continue;
            float value = sums[f][c][half * 2 + e] * scale;
            if (!a.is_split && a.bias != nullptr) value += a.bias[output];
            float* to = out + token * a.num_outputs + output;
            *to = a.accumulate && !a.is_split ? *to + value : value;
          }
        }
      }
    }
  }
};

// Adds the partial sums in the order of the splits: out[m, n] (+)= row_scale[m] * sum + bias[n].
struct SumSplits {
  struct Args {
    const float* partial;  // [splits, M, outputs]
    const float* row_scale;
    const float* bias;
    float* out;
    int64_t splits, num_tokens, num_outputs;
    bool accumulate;
  };
  // A block: one token, kOutputs outputs. No index is divided: that alone would take as long as the sums.
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 0, kOutputs = 4 * kThreads;
  static Grid grid(int64_t num_tokens, int64_t num_outputs) {
    return {num_tokens, (num_outputs + kOutputs - 1) / kOutputs, 1};
  }
  CHAINFED_DEVICE static void run(const Args& a, unsigned char*) {
    const int64_t count = a.num_tokens * a.num_outputs;
    const float scale = a.row_scale[block_x()];
    CHAINFED_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int64_t output = block_y() * kOutputs + j * kThreads + thread_index();
      if (output >= a.num_outputs) return;
      const int64_t i = block_x() * a.num_outputs + output;
      float sum = 0;
      for (int64_t split = 0; split < a.splits; ++split) sum += a.partial[split * count + i];
      sum *= scale;
      if (a.bias != nullptr) sum += a.bias[output];
      a.out[i] = a.accumulate ? a.out[i] + sum : sum;
    }
  }
};

}  // namespace chainfed::cuda

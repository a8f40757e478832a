// Decoding weights one at a time or a tile at a time, exactly (f32): for the exact product, for the scratch matrix of
// the library product, and for single rows.
#pragma once
#include <cstdint>

#include "cuda/tile_codec.h"
#include "quant/nf4_table.h"

namespace chainfed::cuda {

CHAINFED_HOST_DEVICE inline float nf4_value(int code) {
  static constexpr float kTable[16] = {CHAINFED_NF4_VALUES};
  return kTable[code];
}

// The weight at (row, col), both inside the matrix. tiles_per_row as in quant/tile.h.
CHAINFED_HOST_DEVICE inline float weight_at(const MatrixView& w, int64_t tiles_per_row, int64_t row, int64_t col) {
  if (w.format == BlockFormat::f32) return static_cast<const float*>(w.codes)[row * w.num_cols + col];
  if (w.format == BlockFormat::bf16) {
    return bf16_to_float(static_cast<const uint16_t*>(w.codes)[row * w.num_cols + col]);
  }
  const int64_t tile = row / 8 * tiles_per_row + col / 32;
  const int r = static_cast<int>(row % 8), c = static_cast<int>(col % 32);
  const auto* codes = static_cast<const uint8_t*>(w.codes);
  const auto* half_scales = static_cast<const uint16_t*>(w.scales);
  if (w.format == BlockFormat::int8) {
    const auto code = static_cast<int8_t>(codes[tile * kInt8TileBytes + c / 4 * 32 + r * 4 + c % 4]);
    return f16_to_float(half_scales[tile * 8 + r]) * static_cast<float>(code);
  }
  const int byte = codes[tile * kInt4TileBytes + c % 16 / 4 * 32 + r * 4 + c % 4];
  const int code = c < 16 ? byte & 15 : byte >> 4;
  if (w.format == BlockFormat::nf4) return static_cast<const float*>(w.scales)[tile / 2 * 8 + r] * nf4_value(code);
  return f16_to_float(half_scales[tile * 16 + r]) * static_cast<float>(code) +
         f16_to_float(half_scales[tile * 16 + 8 + r]);
}

// out[i] = row row_ids[i] of w: the rows of the targets. Ids outside [first_row, first_row + N) leave their row as it
// is.
struct GatherRows {
  struct Args {
    MatrixView w;
    int64_t tiles_per_row, first_row;
    const int64_t* row_ids;
    float* out;  // [num_ids, K]
  };
  static constexpr int kThreads = 128, kMinBlocks = 1, kSharedBytes = 0;
  static Grid grid(int64_t num_ids) { return {num_ids, 1, 1}; }
  CHAINFED_DEVICE static void run(const Args& a, unsigned char*) {
    const int64_t row = a.row_ids[block_x()] - a.first_row;
    if (row < 0 || row >= a.w.num_rows) return;
    for (int64_t col = thread_index(); col < a.w.num_cols; col += kThreads) {
      a.out[block_x() * a.w.num_cols + col] = weight_at(a.w, a.tiles_per_row, row, col);
    }
  }
};

// Rows [row_begin, row_end) of w to bf16 row-major, columns padded with zeros to a multiple of 8 (cuBLAS reads 16 bytes
// at a time). One warp a tile of 8 rows x 32 columns; a thread writes 4 columns at a time.
struct ToBf16Rows {
  struct Args {
    MatrixView w;
    int64_t tiles_per_row, row_begin, row_end, stride;
    uint16_t* out;  // [row_end - row_begin, stride]
  };
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 0;
  static Grid grid(int64_t num_rows, int64_t stride) {
    const int64_t tiles = (num_rows + 7) / 8 * ((stride + 31) / 32);
    return {(tiles + kThreads / kWarp - 1) / (kThreads / kWarp), 1, 1};
  }
  CHAINFED_DEVICE static void run(const Args& a, unsigned char*) {
    const int64_t across = (a.stride + 31) / 32;
    const int64_t tile = block_x() * (kThreads / kWarp) + thread_index() / kWarp;
    // Lane = 8 columns-of-four x 4 rows, twice: neighbouring lanes write neighbouring columns.
    const int lane = thread_index() % kWarp;
    for (int half = 0; half < 2; ++half) {
      const int64_t row = a.row_begin + tile / across * 8 + half * 4 + lane / 8;
      const int64_t col = tile % across * 32 + lane % 8 * 4;
      if (row >= a.row_end || col >= a.stride) continue;
      uint16_t* to = a.out + (row - a.row_begin) * a.stride + col;
      for (int i = 0; i < 4; ++i) {
        const float value = col + i < a.w.num_cols ? weight_at(a.w, a.tiles_per_row, row, col + i) : 0.0f;
        to[i] = float_to_bf16(value);
      }
    }
  }
};

}  // namespace chainfed::cuda

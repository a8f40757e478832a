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

// Rows [row_begin, row_end) of w, whole tiles, to bf16 row-major, columns padded with zeros to `stride`, a multiple of
// 8 (cuBLAS reads 16 bytes at a time). A warp decodes a tile of 8 rows x 32 columns: a lane one word of it, which is
// four columns and, but for int8, the four 16 further on; it writes 8 bytes a piece, so that a tile's row is two full
// sectors.
struct ToBf16Rows {
  struct Args {
    MatrixView w;
    int64_t tiles_per_row, row_begin, row_end, stride;
    uint16_t* out;  // [row_end - row_begin, stride]
  };
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 64, kTilesOfBlock = kThreads / kWarp;
  // Two dimensions: a division a thread would cost as much as its eight weights.
  static Grid grid(int64_t num_rows, int64_t stride) {
    return {(num_rows + 7) / 8, ((stride + 31) / 32 + kTilesOfBlock - 1) / kTilesOfBlock, 1};
  }

  CHAINFED_DEVICE static void run(const Args& a, unsigned char* shared) {
    auto* table = reinterpret_cast<float*>(shared);  // 16 words in 16 banks: no look-up waits for another
    if (a.w.format == BlockFormat::nf4) {
      if (thread_index() < 16) table[thread_index()] = nf4_value(thread_index());
      sync_threads();
    }
    const int lane = thread_index() % kWarp, r = lane % 8, j = lane / 8;  // word [j][r] of a tile: lane 8 j + r
    const int64_t row = a.row_begin + block_x() * 8 + r;
    const int64_t col = (block_y() * kTilesOfBlock + thread_index() / kWarp) * 32 + 4 * j;
    if (row >= a.row_end || col >= a.stride) return;
    const int64_t tile = row / 8 * a.tiles_per_row + col / 32;
    float values[8];
    switch (a.w.format) {
      case BlockFormat::int4: {
        const auto* scales = static_cast<const uint16_t*>(a.w.scales) + tile * 16 + r;
        decode_nibbles_f32(word_of(a.w, tile * 32 + lane), half_value(scales[0]), half_value(scales[8]), values);
        break;
      }
      case BlockFormat::nf4: {
        const float absmax = static_cast<const float*>(a.w.scales)[tile / 2 * 8 + r];
        const uint32_t word = word_of(a.w, tile * 32 + lane);
        CHAINFED_UNROLL
        for (int i = 0; i < 8; ++i) values[i] = absmax * table[word >> shift_of(i) & 15u];
        break;
      }
      case BlockFormat::int8: {
        const float scale = half_value(static_cast<const uint16_t*>(a.w.scales)[tile * 8 + r]);
        decode_bytes_f32(word_of(a.w, tile * 64 + lane), scale, values);
        decode_bytes_f32(word_of(a.w, tile * 64 + 32 + lane), scale, values + 4);
        break;
      }
      default:
        for (int i = 0; i < 8; ++i) {
          const int64_t at = col + i % 4 + 16 * (i / 4);
          values[i] = at < a.w.num_cols ? weight_at(a.w, a.tiles_per_row, row, at) : 0.0f;
        }
    }
    uint16_t* to = a.out + (row - a.row_begin) * a.stride + col;
    write(a, col, values, to);
    if (col + 16 < a.stride) write(a, col + 16, values + 4, to + 16);
  }

 private:
  CHAINFED_DEVICE static uint32_t word_of(const MatrixView& w, int64_t index) {
    return static_cast<const uint32_t*>(w.codes)[index];
  }
  // Of the i-th of a word's eight nibbles: four low ones, then four high ones.
  CHAINFED_DEVICE static int shift_of(int i) { return i % 4 * 8 + i / 4 * 4; }

  // A code or-ed into 2^23 is that much more, exactly: no conversion instruction, of which a processor does a quarter
  // as many.
  CHAINFED_DEVICE static void decode_nibbles_f32(uint32_t word, float scale, float offset, float* out) {
    CHAINFED_UNROLL
    for (int i = 0; i < 8; ++i) {
      const float code = bits_float(mask_or(word >> shift_of(i), 15u, 0x4B000000u)) - 8388608.0f;
      out[i] = multiply_add(scale, code, offset);
    }
  }
  CHAINFED_DEVICE static void decode_bytes_f32(uint32_t word, float scale, float* out) {
    const uint32_t raised = word ^ 0x80808080u;  // q + 128 without a sign
    CHAINFED_UNROLL
    for (int i = 0; i < 4; ++i) {
      out[i] = scale * (bits_float(mask_or(raised >> 8 * i, 255u, 0x4B000000u)) - 8388736.0f);
    }
  }
  CHAINFED_DEVICE static void write(const Args& a, int64_t col, const float* values, uint16_t* to) {
    float inside[4];
    CHAINFED_UNROLL
    for (int i = 0; i < 4; ++i) inside[i] = col + i < a.w.num_cols ? values[i] : 0.0f;
    *reinterpret_cast<Uint2*>(to) = {bf16_pair(inside[0], inside[1]), bf16_pair(inside[2], inside[3])};
  }
};

}  // namespace chainfed::cuda

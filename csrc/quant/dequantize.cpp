// Whole rows back to f32: a range of rows, or the rows of an embedding lookup.
#include <algorithm>
#include <cstring>

#include "base/half.h"
#include "base/thread_pool.h"
#include "chainfed/kernels.h"
#include "quant/decode_tiles.h"
#include "quant/nf4_table.h"
#include "quant/tile.h"

namespace chainfed {
namespace {

// Rows [first, last) of one row tile, row `first` at out.
void decode_rows_of_tile(const DecodeTiles& decode, const MatrixView& w, int64_t row_tile, int64_t first, int64_t last,
                         float* out) {
  const int64_t num_tiles = (w.num_cols + kTileCols - 1) / kTileCols;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const int64_t col = tile * kTileCols, width = std::min(kTileCols, w.num_cols - col);
    if (first == 0 && last == kTileRows && width == kTileCols) {
      decode.by_row(w, row_tile, tile, out + col, w.num_cols, 16);
      continue;
    }
    alignas(64) float block[kTileRows * kTileCols];
    decode.by_row(w, row_tile, tile, block, kTileCols, 16);
    for (int64_t r = first; r < last; ++r) {
      std::memcpy(out + (r - first) * w.num_cols + col, block + r * kTileCols, width * sizeof(float));
    }
  }
}

// One row without the other seven.
void decode_row(const MatrixView& w, int64_t row, float* out) {
  const int64_t tile_row = row % kTileRows;
  const int64_t first_tile = row / kTileRows * tiles_per_row(w);
  const auto* half_scales = static_cast<const uint16_t*>(w.scales);
  for (int64_t col = 0; col < w.num_cols; col += kTileCols) {
    const int64_t index = first_tile + col / kTileCols;
    const auto* codes = static_cast<const uint8_t*>(w.codes) + index * tile_bytes(w.format);
    const int width = static_cast<int>(std::min(kTileCols, w.num_cols - col));
    const int r = static_cast<int>(tile_row);
    if (w.format == BlockFormat::int4) {
      const float scale = f16_to_float(half_scales[index * 16 + r]),
                  offset = f16_to_float(half_scales[index * 16 + 8 + r]);
      for (int c = 0; c < width; ++c) out[col + c] = scale * static_cast<float>(nibble_at(codes, r, c)) + offset;
    } else if (w.format == BlockFormat::int8) {
      const float scale = f16_to_float(half_scales[index * 8 + r]);
      for (int c = 0; c < width; ++c) out[col + c] = scale * static_cast<int8_t>(codes[int8_position(r, c)]);
    } else {
      const float absmax = static_cast<const float*>(w.scales)[index / 2 * 8 + r];
      for (int c = 0; c < width; ++c) out[col + c] = absmax * kNf4Table[nibble_at(codes, r, c)];
    }
  }
}

void copy_row(const MatrixView& w, int64_t row, float* out) {
  if (w.format == BlockFormat::f32) {
    std::memcpy(out, static_cast<const float*>(w.codes) + row * w.num_cols, w.num_cols * sizeof(float));
    return;
  }
  const auto* source = static_cast<const uint16_t*>(w.codes) + row * w.num_cols;
  for (int64_t c = 0; c < w.num_cols; ++c) out[c] = bf16_to_float(source[c]);
}

}  // namespace

void dequantize_rows(const MatrixView& w, int64_t row_begin, int64_t row_end, float* out) {
  if (row_begin >= row_end) return;
  const DecodeTiles& decode = decode_tiles(w.format);
  const int64_t first_tile = row_begin / kTileRows, last_tile = (row_end + kTileRows - 1) / kTileRows;
  parallel_for(last_tile - first_tile, [&](int64_t i) {
    const int64_t row = (first_tile + i) * kTileRows;
    const int64_t first = std::max(row_begin, row), last = std::min(row_end, row + kTileRows);
    decode_rows_of_tile(decode, w, first_tile + i, first - row, last - row, out + (first - row_begin) * w.num_cols);
  });
}

void gather_rows(const MatrixView& w, const int64_t* row_ids, int64_t num_ids, float* out) {
  const bool row_major = w.format == BlockFormat::f32 || w.format == BlockFormat::bf16;
  parallel_for(num_ids, [&](int64_t i) { (row_major ? copy_row : decode_row)(w, row_ids[i], out + i * w.num_cols); });
}

}  // namespace chainfed

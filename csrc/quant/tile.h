// Where a code lies inside a tile; see chainfed/block_format.h for the layout. `static`: see base/half.h.
#pragma once
#include <cstdint>

#include "chainfed/block_format.h"

namespace chainfed {

// int4 and nf4: the 4-bit code of (row, col), row in 0..7, col in 0..31.
static inline int nibble_at(const uint8_t* tile, int row, int col) {
  const int byte = tile[(col % 16) / 4 * 32 + row * 4 + col % 4];
  return col < 16 ? byte & 15 : byte >> 4;
}

// int8: the position of (row, col) inside the tile.
static inline int int8_position(int row, int col) { return col / 4 * 32 + row * 4 + col % 4; }

// Tiles in one run of eight rows.
static inline int64_t tiles_per_row(const MatrixView& w) {
  const int64_t multiple = w.format == BlockFormat::nf4 ? kNf4BlockCols : kTileCols;
  return (w.num_cols + multiple - 1) / multiple * (multiple / kTileCols);
}

static inline int64_t num_row_tiles(const MatrixView& w) { return (w.num_rows + kTileRows - 1) / kTileRows; }

static inline int64_t tile_bytes(BlockFormat format) {
  return format == BlockFormat::int8 ? kInt8TileBytes : kInt4TileBytes;
}

}  // namespace chainfed

#include <cstdint>

#include "base/half.h"
#include "base/simd_level.h"
#include "quant/decode_tiles.h"
#include "quant/nf4_table.h"
#include "quant/tile.h"

namespace chainfed {
namespace {

// The readable definition of every format: the value of (row, col) inside one tile.
template <BlockFormat Format>
float decode(const MatrixView& w, int64_t row_tile, int64_t tile, int row, int col) {
  const int64_t row_index = row_tile * kTileRows + row, col_index = tile * kTileCols + col;
  if constexpr (Format == BlockFormat::f32 || Format == BlockFormat::bf16) {
    if (row_index >= w.num_rows || col_index >= w.num_cols) return 0.0f;
    const int64_t position = row_index * w.num_cols + col_index;
    if constexpr (Format == BlockFormat::f32) return static_cast<const float*>(w.codes)[position];
    return bf16_to_float(static_cast<const uint16_t*>(w.codes)[position]);
  } else {
    const int64_t index = row_tile * tiles_per_row(w) + tile;
    const auto* codes = static_cast<const uint8_t*>(w.codes) + index * tile_bytes(Format);
    const auto* half_scales = static_cast<const uint16_t*>(w.scales);
    if constexpr (Format == BlockFormat::int4) {
      const float scale = f16_to_float(half_scales[index * 16 + row]);
      return scale * static_cast<float>(nibble_at(codes, row, col)) + f16_to_float(half_scales[index * 16 + 8 + row]);
    } else if constexpr (Format == BlockFormat::int8) {
      const auto code = static_cast<int8_t>(codes[int8_position(row, col)]);
      return f16_to_float(half_scales[index * 8 + row]) * static_cast<float>(code);
    } else {
      // Rows hold an even number of tiles, so index / 2 counts the blocks of 64.
      return static_cast<const float*>(w.scales)[index / 2 * 8 + row] * kNf4Table[nibble_at(codes, row, col)];
    }
  }
}

template <BlockFormat Format>
void by_column(const MatrixView& w, int64_t row_tile, int64_t first_tile, int64_t num_tiles, float* out,
               int64_t stride) {
  for (int64_t t = 0; t < num_tiles; ++t) {
    for (int col = 0; col < kTileCols; ++col, out += stride) {
      for (int row = 0; row < kTileRows; ++row) out[row] = decode<Format>(w, row_tile, first_tile + t, row, col);
    }
  }
}

template <BlockFormat Format>
void by_row(const MatrixView& w, int64_t row_tile, int64_t tile, float* out, int64_t stride, int64_t half) {
  for (int row = 0; row < kTileRows; ++row, out += stride) {
    for (int col = 0; col < kTileCols; ++col) {
      out[col < 16 ? col : half + col - 16] = decode<Format>(w, row_tile, tile, row, col);
    }
  }
}

template <BlockFormat Format>
constexpr DecodeTiles kDecode = {&by_column<Format>, &by_row<Format>};

constexpr SimdTable<const DecodeTiles*> kTable = CHAINFED_LEVELS(
    kDecodeTilesScalar, kDecodeTilesAvx2, kDecodeTilesAvx512, kDecodeTilesNeon, kDecodeTilesNeon, kDecodeTilesNeon);

}  // namespace

const DecodeTiles kDecodeTilesScalar[5] = {kDecode<BlockFormat::int4>, kDecode<BlockFormat::nf4>,
                                           kDecode<BlockFormat::int8>, kDecode<BlockFormat::bf16>,
                                           kDecode<BlockFormat::f32>};

const DecodeTiles& decode_tiles(BlockFormat format) { return select(kTable)[static_cast<int>(format)]; }

}  // namespace chainfed

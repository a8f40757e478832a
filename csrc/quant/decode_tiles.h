// Decoding tiles to f32, a version a format and SIMD level; all versions give the same bits (a scale times a code is
// exact in f32, so one rounding remains). Row-major bf16 and f32 matrices are read as if they had tiles too: what
// lies beyond the matrix decodes to 0.
#pragma once
#include <cstdint>

#include "chainfed/block_format.h"

namespace chainfed {

struct DecodeTiles {
  // out[c * stride + r] for 8 rows of row tile `row_tile` and 32 * num_tiles columns from tile `first_tile`.
  void (*by_column)(const MatrixView& w, int64_t row_tile, int64_t first_tile, int64_t num_tiles, float* out,
                    int64_t stride);
  // One tile: columns 0..15 at out[r * stride + c], columns 16..31 at out[half + r * stride + c - 16].
  void (*by_row)(const MatrixView& w, int64_t row_tile, int64_t tile, float* out, int64_t stride, int64_t half);
};

// Indexed by BlockFormat.
extern const DecodeTiles kDecodeTilesScalar[5], kDecodeTilesAvx2[5], kDecodeTilesAvx512[5], kDecodeTilesNeon[5];
// The table of the SIMD level in force.
const DecodeTiles& decode_tiles(BlockFormat format);

}  // namespace chainfed

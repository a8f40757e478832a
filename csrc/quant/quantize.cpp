// Weights to block formats: checks for non-finite values, transposes eight rows at a time and hands them to the
// tile functions; row runs are shared out over the threads. Owns eight padded rows a thread.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "base/half.h"
#include "base/simd_level.h"
#include "base/thread_pool.h"
#include "chainfed/error.h"
#include "chainfed/kernels.h"
#include "quant/quantize_tiles.h"

namespace chainfed {
namespace {

constexpr SimdTable<const QuantizeTiles*> kTable =
    CHAINFED_LEVELS(&kQuantizeTilesScalar, &kQuantizeTilesAvx2, &kQuantizeTilesAvx2, &kQuantizeTilesNeon,
                    &kQuantizeTilesNeon, &kQuantizeTilesNeon);

void require_finite(const float* row, int64_t row_index, int64_t num_cols) {
  // An all-ones exponent marks Inf and NaN; a plain or over the row vectorises where std::isfinite would not.
  uint32_t found = 0;
  for (int64_t c = 0; c < num_cols; ++c) {
    found |= (float_bits(row[c]) & 0x7F800000u) == 0x7F800000u ? 1u : 0u;
  }
  if (found == 0) return;
  int64_t c = 0;
  while (std::isfinite(row[c])) ++c;
  throw InvalidArgument("quantize_blocks: weight must be finite, got " + std::to_string(row[c]) + " in row " +
                        std::to_string(row_index) + ", column " + std::to_string(c));
}

// columns[c][r] = weight[row_begin + r][c], zero beyond the matrix.
void transpose_rows(const float* weight, int64_t row_begin, int64_t num_rows, int64_t num_cols, float* columns) {
  for (int64_t r = 0; r < num_rows; ++r) {
    const float* row = weight + (row_begin + r) * num_cols;
    for (int64_t c = 0; c < num_cols; ++c) columns[c * kTileRows + r] = row[c];
  }
}

void quantize_run(const QuantizeTiles& tiles, BlockFormat format, const float* columns, int64_t num_tiles, int64_t run,
                  void* codes, void* scales) {
  bool fits = true;
  auto* code_bytes = static_cast<uint8_t*>(codes);
  if (format == BlockFormat::int4) {
    fits = tiles.int4(columns, num_tiles, code_bytes + run * num_tiles * kInt4TileBytes,
                      static_cast<uint16_t*>(scales) + run * num_tiles * 2 * kTileRows);
  } else if (format == BlockFormat::int8) {
    fits = tiles.int8(columns, num_tiles, reinterpret_cast<int8_t*>(code_bytes) + run * num_tiles * kInt8TileBytes,
                      static_cast<uint16_t*>(scales) + run * num_tiles * kTileRows);
  } else {
    tiles.nf4(columns, num_tiles, code_bytes + run * num_tiles * kInt4TileBytes,
              static_cast<float*>(scales) + run * (num_tiles / 2) * kTileRows);
  }
  if (!fits) {
    throw InvalidArgument("quantize_blocks: a weight in rows " + std::to_string(run * kTileRows) + ".." +
                          std::to_string(run * kTileRows + kTileRows - 1) + " is too large for the f16 scales of " +
                          block_format_name(format) + "; use bf16 or f32 for this matrix");
  }
}

}  // namespace

void quantize_blocks(const float* weight, int64_t num_rows, int64_t num_cols, BlockFormat format, void* codes,
                     void* scales) {
  parallel_for(num_rows, [&](int64_t row) { require_finite(weight + row * num_cols, row, num_cols); });
  if (format == BlockFormat::f32) {
    std::memcpy(codes, weight, static_cast<size_t>(num_rows * num_cols) * sizeof(float));
    return;
  }
  if (format == BlockFormat::bf16) {
    auto* out = static_cast<uint16_t*>(codes);
    parallel_for(num_rows, [&](int64_t row) {
      for (int64_t i = row * num_cols; i < (row + 1) * num_cols; ++i) out[i] = float_to_bf16(weight[i]);
    });
    return;
  }
  const QuantizeTiles& tiles = *select(kTable);
  const int64_t num_runs = padded_rows(format, num_rows) / kTileRows;
  const int64_t num_tiles = padded_cols(format, num_cols) / kTileCols;
  parallel_ranges(num_runs, [&](int64_t begin, int64_t end, int) {
    std::vector<float> columns(static_cast<size_t>(num_tiles * kTileCols * kTileRows));
    for (int64_t run = begin; run < end; ++run) {
      const int64_t rows = std::min(kTileRows, num_rows - run * kTileRows);
      if (rows < kTileRows) std::fill(columns.begin(), columns.end(), 0.0f);
      transpose_rows(weight, run * kTileRows, rows, num_cols, columns.data());
      quantize_run(tiles, format, columns.data(), num_tiles, run, codes, scales);
    }
  });
}

}  // namespace chainfed

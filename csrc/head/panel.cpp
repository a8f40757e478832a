#include "head/panel.h"

#include <algorithm>

#include "base/half.h"
#include "quant/nf4_table.h"
#include "quant/tile.h"

namespace chainfed {
namespace {

float weight_at(const MatrixView& w, int64_t row, int64_t col) {
  if (w.format == BlockFormat::f32) return static_cast<const float*>(w.codes)[row * w.num_cols + col];
  if (w.format == BlockFormat::bf16)
    return bf16_to_float(static_cast<const uint16_t*>(w.codes)[row * w.num_cols + col]);
  const int64_t tile = row / kTileRows * tiles_per_row(w) + col / kTileCols;
  const int r = static_cast<int>(row % kTileRows), c = static_cast<int>(col % kTileCols);
  const auto* codes = static_cast<const uint8_t*>(w.codes) + tile * tile_bytes(w.format);
  const auto* half_scales = static_cast<const uint16_t*>(w.scales);
  if (w.format == BlockFormat::int8) {
    return f16_to_float(half_scales[tile * 8 + r]) *
           static_cast<float>(static_cast<int8_t>(codes[int8_position(r, c)]));
  }
  const int q = nibble_at(codes, r, c);
  if (w.format == BlockFormat::nf4) return static_cast<const float*>(w.scales)[tile / 2 * 8 + r] * kNf4Table[q];
  return f16_to_float(half_scales[tile * 16 + r]) * static_cast<float>(q) +
         f16_to_float(half_scales[tile * 16 + 8 + r]);
}

}  // namespace

MatrixView row_range(const MatrixView& w, int64_t first_row, int64_t num_rows) {
  MatrixView part = w;
  part.num_rows = num_rows;
  if (first_row > 0) {
    part.codes = static_cast<const char*>(w.codes) + codes_bytes(w.format, first_row, w.num_cols);
    if (w.scales != nullptr)
      part.scales = static_cast<const char*>(w.scales) + scales_bytes(w.format, first_row, w.num_cols);
  }
  return part;
}

void decode_panel(const MatrixView& w, int64_t first_row, int64_t num_rows, int64_t first_col, float* panel) {
  const int64_t num_cols = std::min(kPanelCols, w.num_cols - first_col);
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t c = 0; c < kPanelCols; ++c) {
      panel[r * kPanelCols + c] = c < num_cols ? weight_at(w, first_row + r, first_col + c) : 0.0f;
    }
  }
}

}  // namespace chainfed

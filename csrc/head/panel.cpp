#include "head/panel.h"

#include "quant/decode_tiles.h"

namespace chainfed {

MatrixView row_range(const MatrixView& w, int64_t first_row, int64_t num_rows) {
  MatrixView part = w;
  part.num_rows = num_rows;
  if (first_row == 0) return part;
  part.codes = static_cast<const char*>(w.codes) + codes_bytes(w.format, first_row, w.num_cols);
  if (w.scales != nullptr) {
    part.scales = static_cast<const char*>(w.scales) + scales_bytes(w.format, first_row, w.num_cols);
  }
  return part;
}

void decode_panel(const MatrixView& w, int64_t first_row, int64_t num_rows, int64_t first_col, float* panel) {
  const DecodeTiles& decode = decode_tiles(w.format);
  for (int64_t row = 0; row < num_rows; row += kTileRows) {
    decode.by_row(w, (first_row + row) / kTileRows, first_col / kTileCols, panel + row * kPanelCols, kPanelCols,
                  kPanelCols / 2);
  }
}

}  // namespace chainfed

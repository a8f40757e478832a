// Pieces of a frozen matrix: a run of its rows as a matrix of its own, and 32 of its columns in f32.
#pragma once
#include <cstdint>

#include "chainfed/block_format.h"
#include "head/cell.h"

namespace chainfed {

// Rows [first_row, first_row + num_rows) of w; first_row is a multiple of 8.
MatrixView row_range(const MatrixView& w, int64_t first_row, int64_t num_rows);
// panel[r][c] = w[first_row + r][first_col + c] for num_rows rows, rounded up to whole tiles of 8, and 32 columns. What
// lies beyond w is finite and meaningless. first_col is a multiple of 32, first_row of 8.
void decode_panel(const MatrixView& w, int64_t first_row, int64_t num_rows, int64_t first_col, float* panel);

}  // namespace chainfed

#include <algorithm>
#include <cmath>
#include <limits>

#include "head/cell.h"

namespace chainfed {

float softmax_row_scalar(float* z, int64_t count, float* running_max, float* running_sum) {
  float max = *running_max;
  bool has_nan = false;
  for (int64_t i = 0; i < count; ++i) {
    max = std::max(max, z[i]);
    has_nan |= std::isnan(z[i]);
  }
  if (has_nan || !std::isfinite(max)) {
    *running_max = *running_sum = std::numeric_limits<float>::quiet_NaN();
    std::fill(z, z + count, 0.0f);
    return 1.0f;
  }
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += z[i] = std::exp(z[i] - max);
  const float rescale = std::exp(*running_max - max);
  *running_max = max;
  *running_sum = static_cast<float>(*running_sum * static_cast<double>(rescale) + sum);
  return rescale;
}

void fill_cell_scalar(const float* const* e, int64_t count, const float* least, Cell* cell) {
  float left_out[kBlockTokens] = {};
  cell->count = 0;
  for (int64_t row = 0; row < count; ++row) {
    bool wanted = false;
    float* weight = cell->weight[cell->count];
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      const bool keep = e[t][row] >= least[t];
      weight[t] = keep ? e[t][row] : 0.0f;
      left_out[t] += keep ? 0.0f : e[t][row];
      wanted |= keep;
    }
    if (wanted) cell->row[cell->count++] = static_cast<uint8_t>(row);
  }
  if (*std::max_element(left_out, left_out + kBlockTokens) > 0) {
    std::copy(left_out, left_out + kBlockTokens, cell->weight[cell->count]);
    cell->row[cell->count++] = kMeanRow;
  }
}

void accumulate_cell_scalar(const Cell& cell, const float* panel, float* const* grad) {
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    for (int64_t c = 0; c < kPanelCols; ++c) {
      double sum = 0;
      for (int64_t k = 0; k < cell.count; ++k) {
        sum += static_cast<double>(cell.weight[k][t]) * panel[cell.row[k] * kPanelCols + c];
      }
      grad[t][c] = static_cast<float>(grad[t][c] + sum);
    }
  }
}

}  // namespace chainfed

#include "head/int16_cell.h"

#include <algorithm>
#include <cmath>

namespace chainfed {
namespace {

int64_t lane_of_column(int64_t col) { return col % 16 / 4 * 8 + col / 16 * 4 + col % 4; }

}  // namespace

void quantize_cell_scalar(const Cell& cell, Int16Cell* out) {
  out->num_pairs = (cell.count + 1) / 2;
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    float largest = 0, sum = 0;
    for (int64_t k = 0; k < cell.count; ++k) {
      largest = std::max(largest, cell.weight[k][t]);
      sum += cell.weight[k][t];
    }
    const float scale = std::max(largest / kLargestInt16, sum / kWeightSum);
    const float factor = scale >= kLeastScale ? 1.0f / scale : 0.0f;
    out->scale[t] = scale;
    for (int64_t k = 0; k < 2 * out->num_pairs; ++k) {
      const float weight = k < cell.count ? cell.weight[k][t] * factor : 0.0f;
      out->weight[k / 2][t][k % 2] = static_cast<int16_t>(std::nearbyint(std::min(weight, kLargestInt16)));
    }
  }
  for (int64_t k = 0; k < 2 * out->num_pairs; ++k) out->row[k / 2][k % 2] = k < cell.count ? cell.row[k] : cell.row[0];
}

void quantize_panel_scalar(const float* panel, int64_t num_rows, Int16Panel* out) {
  for (int64_t c = 0; c < kPanelCols; ++c) {
    float largest = 0;
    for (int64_t r = 0; r < num_rows; ++r) largest = std::max(largest, std::fabs(panel[r * kPanelCols + c]));
    const float scale = largest / kLargestInt16;
    const float factor = scale >= kLeastScale ? 1.0f / scale : 0.0f;
    out->scale[c] = scale;
    for (int64_t r = 0; r <= kCellRows; ++r) {
      if (r >= num_rows && r != kMeanRow) continue;
      const float value = std::clamp(panel[r * kPanelCols + c] * factor, -kLargestInt16, kLargestInt16);
      out->value[r][lane_of_column(c)] = static_cast<int16_t>(std::nearbyint(value));
    }
  }
}

void accumulate_int16_scalar(const Int16Cell& cell, const Int16Panel& panel, float* const* grad) {
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    for (int64_t c = 0; c < kPanelCols; ++c) {
      int32_t sum = 0;
      for (int64_t k = 0; k < 2 * cell.num_pairs; ++k) {
        sum += cell.weight[k / 2][t][k % 2] * panel.value[cell.row[k / 2][k % 2]][lane_of_column(c)];
      }
      grad[t][c] += static_cast<float>(sum) * (cell.scale[t] * panel.scale[c]);
    }
  }
}

}  // namespace chainfed

// The gradient's product in 16-bit integers, for quantised heads with quantised activations: twice the multiplications
// an instruction of f32. A cell's weights become integers with one scale a token, its panel of W integers with one
// scale a column; 32-bit sums of the products cannot overflow, because a token's integers add up to at most
// kWeightSum + 65 and a panel's stay within 32767. A token's gradient moves by at most 129 half units of
// 1 / 65000, 1e-3 of the cell's probability times max |W|, and in practice by 1e-4, for roundings cancel: a hundredth
// of what rounding the activations to 8 bits does.
#pragma once
#include <cstdint>

#include "head/cell.h"

namespace chainfed {

constexpr int64_t kMaxPairs = kCellRows / 2 + 1;
constexpr float kWeightSum = 65000.0f;
constexpr float kLargestInt16 = 32767.0f;
// Scales below this count as 0, lest their inverse overflow; weights are relative to a maximum of 1.
constexpr float kLeastScale = 1e-30f;

// The listed rows two by two; an odd list is filled up with a weight of 0. A list of all rows of the cell needs no
// list: its pairs are those of Int16Panel::pair.
struct alignas(64) Int16Cell {
  int16_t weight[kMaxPairs][kBlockTokens][2];
  uint8_t row[kMaxPairs][2];
  float scale[kBlockTokens];  // weight = scale * integer
  int32_t num_pairs;

  bool lists_all_rows() const { return num_pairs >= kCellRows / 2 && row[kCellRows / 2 - 1][1] == kCellRows - 1; }
};

// 32 columns of a cell's rows and their mean. Lane order within a row: 0-3, 16-19, 4-7, 20-23, 8-11, 24-27, 12-15,
// 28-31, so that interleaving two rows leaves the columns in order.
struct alignas(64) Int16Panel {
  int16_t value[kCellRows + 1][kPanelCols];
  float scale[kPanelCols];
  // x86 alone: rows 2i and 2i + 1 (for the mean: 0) interleaved, columns in order.
  int16_t pair[kMaxPairs][kPanelCols][2];
};

using QuantizeCell = void (*)(const Cell& cell, Int16Cell* out);
// panel f32 [129][32]; rows `num_rows` to 127 are not read.
using QuantizePanel = void (*)(const float* panel, int64_t num_rows, Int16Panel* out);
// As AccumulateCell.
using AccumulateInt16 = void (*)(const Int16Cell& cell, const Int16Panel& panel, float* const* grad /*[4]*/);

void quantize_cell_scalar(const Cell& cell, Int16Cell* out);
void quantize_panel_scalar(const float* panel, int64_t num_rows, Int16Panel* out);
void accumulate_int16_scalar(const Int16Cell& cell, const Int16Panel& panel, float* const* grad);
#if defined(CHAINFED_X86)
void quantize_cell_avx2(const Cell& cell, Int16Cell* out);
void quantize_panel_avx2(const float* panel, int64_t num_rows, Int16Panel* out);
void accumulate_int16_avx2(const Int16Cell& cell, const Int16Panel& panel, float* const* grad);
void accumulate_int16_avx512vnni(const Int16Cell& cell, const Int16Panel& panel, float* const* grad);
#elif defined(CHAINFED_ARM64)
void quantize_cell_neon(const Cell& cell, Int16Cell* out);
void quantize_panel_neon(const float* panel, int64_t num_rows, Int16Panel* out);
void accumulate_int16_neon(const Int16Cell& cell, const Int16Panel& panel, float* const* grad);
#endif

}  // namespace chainfed

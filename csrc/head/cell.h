// What passes between the three phases of the cross-entropy: tokens are taken kChunkTokens at a time, the vocabulary
// rows of a shard kVocabularyTile at a time.
//   1 logits   [tokens, kVocabularyTile] by the quantised linear
//   2 weights  exp(z - running_max), sorted into cells: 4 tokens x 128 vocabulary rows, of which a cell lists only
//              the rows that some of its tokens gives weight to
//   3 grad     grad += cell.weight^T * W, a panel of kPanelCols columns at a time, the panel's rows of W decoded once
//              for all tokens of the chunk
//
// The tail of a softmax costs as much as its head and gives next to nothing, so phase 2 leaves out every weight below
// `cutoff` * running_sum. Both only make this sound: the running sum (in units of one token's final maximum) never
// falls, so at most V * cutoff of a token's probability is left out; and what is left out in a cell is not lost but
// given to the mean of the cell's 128 rows (one more row in the list). With delta <= V * cutoff the probability left
// out, the gradient is off by at most delta * max_v |W_v - mean of its cell| <= 2 * delta * max_v |W_v|. The choice is
// made for each token alone, so a row's result does not depend on the rows beside it.
#pragma once
#include <cstdint>

namespace chainfed {

constexpr int64_t kChunkTokens = 256;
constexpr int64_t kBlockTokens = 4;
constexpr int64_t kCellRows = 128;
constexpr int64_t kTileCells = 4;
constexpr int64_t kVocabularyTile = kTileCells * kCellRows;
constexpr int64_t kPanelCols = 32;
// 2^-21: with 49152 rows at most 2.3 % of a token's probability moves to the cell means; measured on a trained model
// 0.1 %, which changes the gradient far less than quantising the activations does. Exact activations get 2^-26.
constexpr float kCutoffInt8 = 4.76837158203125e-7f;
constexpr float kCutoffF32 = 1.490116119384765625e-8f;

constexpr uint8_t kMeanRow = kCellRows;

struct alignas(64) Cell {
  float weight[kCellRows + 1][kBlockTokens];
  uint8_t row[kCellRows + 1];  // 0..127 within the cell, ascending; then perhaps kMeanRow
  int32_t count;
};

// e[i] = exp(z[i] - max) in place, with max the larger of *running_max and the row's; folds the row into *running_max
// and *running_sum and returns exp(old max - max), by which everything summed before must be multiplied. Makes both
// running values NaN when the new maximum is not finite or a z is NaN; the row is then all zeros.
using SoftmaxRow = float (*)(float* z, int64_t count, float* running_max, float* running_sum);
// Lists in `cell` the rows (of count <= 128) where some e[token][row] >= least[token] > 0.
using FillCell = void (*)(const float* const* e /*[4] rows of [count]*/, int64_t count, const float* least /*[4]*/,
                          Cell* cell);
// grad[t][c] += sum over the cell's list of weight[.][t] * panel[row][c], for 4 tokens and all kPanelCols columns.
using AccumulateCell = void (*)(const Cell& cell, const float* panel /*[129][32]*/, float* const* grad /*[4]*/);

float softmax_row_scalar(float* z, int64_t count, float* running_max, float* running_sum);
void fill_cell_scalar(const float* const* e, int64_t count, const float* least, Cell* cell);
void accumulate_cell_scalar(const Cell& cell, const float* panel, float* const* grad);
#if defined(CHAINFED_X86)
float softmax_row_avx2(float* z, int64_t count, float* running_max, float* running_sum);
void fill_cell_avx2(const float* const* e, int64_t count, const float* least, Cell* cell);
void accumulate_cell_avx2(const Cell& cell, const float* panel, float* const* grad);
float softmax_row_avx512vnni(float* z, int64_t count, float* running_max, float* running_sum);
void fill_cell_avx512vnni(const float* const* e, int64_t count, const float* least, Cell* cell);
void accumulate_cell_avx512vnni(const Cell& cell, const float* panel, float* const* grad);
#elif defined(CHAINFED_ARM64)
float softmax_row_neon(float* z, int64_t count, float* running_max, float* running_sum);
void fill_cell_neon(const float* const* e, int64_t count, const float* least, Cell* cell);
void accumulate_cell_neon(const Cell& cell, const float* panel, float* const* grad);
#endif

}  // namespace chainfed

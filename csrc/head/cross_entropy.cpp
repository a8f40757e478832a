// The driver of the cross-entropy kernels: chunks of tokens, tiles of vocabulary rows, the three phases of cell.h, each
// split over the threads. Which thread does what never changes a result.
#include <algorithm>
#include <cmath>
#include <limits>

#include "base/simd_level.h"
#include "base/thread_pool.h"
#include "base/workspace.h"
#include "chainfed/kernels.h"
#include "gemm/linear.h"
#include "head/cell.h"
#include "head/int16_cell.h"
#include "head/panel.h"

namespace chainfed {
namespace {

constexpr SimdTable<SoftmaxRow> kSoftmaxRow = CHAINFED_LEVELS(
    softmax_row_scalar, softmax_row_avx2, softmax_row_avx512vnni, softmax_row_neon, softmax_row_neon, softmax_row_neon);
constexpr SimdTable<FillCell> kFillCell = CHAINFED_LEVELS(fill_cell_scalar, fill_cell_avx2, fill_cell_avx512vnni,
                                                          fill_cell_neon, fill_cell_neon, fill_cell_neon);
constexpr SimdTable<AccumulateCell> kAccumulateCell =
    CHAINFED_LEVELS(accumulate_cell_scalar, accumulate_cell_avx2, accumulate_cell_avx512vnni, accumulate_cell_neon,
                    accumulate_cell_neon, accumulate_cell_neon);
constexpr SimdTable<QuantizeCell> kQuantizeCell =
    CHAINFED_LEVELS(quantize_cell_scalar, quantize_cell_avx2, quantize_cell_avx2, quantize_cell_neon,
                    quantize_cell_neon, quantize_cell_neon);
constexpr SimdTable<QuantizePanel> kQuantizePanel =
    CHAINFED_LEVELS(quantize_panel_scalar, quantize_panel_avx2, quantize_panel_avx2, quantize_panel_neon,
                    quantize_panel_neon, quantize_panel_neon);
constexpr SimdTable<AccumulateInt16> kAccumulateInt16 =
    CHAINFED_LEVELS(accumulate_int16_scalar, accumulate_int16_avx2, accumulate_int16_avx512vnni, accumulate_int16_neon,
                    accumulate_int16_neon, accumulate_int16_neon);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Everything the phases of one chunk share. Pointers are those of the chunk's first token.
struct Chunk {
  const float* hidden;
  const int64_t* targets;
  int64_t num_tokens, hidden_size;
  float *running_max, *running_sum, *target_logit, *grad;
  float cutoff;
  bool integer;  // quantised head and activations: the gradient's product in int16
  // Workspace.
  float* logits;             // [num_tokens, rows of the tile]
  float* rescale;            // [num_tokens]
  Cell* cells;               // [blocks, kTileCells], or
  Int16Cell* integer_cells;  // the same memory
  void* linear;

  int64_t num_blocks() const { return ceil_div(num_tokens, kBlockTokens); }
};

int64_t carve(Workspace& workspace, BlockFormat format, int64_t num_tokens, int64_t num_rows, int64_t hidden_size,
              Chunk* chunk) {
  const int64_t tokens = std::min(num_tokens, kChunkTokens), rows = std::min(num_rows, kVocabularyTile);
  chunk->logits = workspace.take<float>(tokens * rows);
  chunk->rescale = workspace.take<float>(tokens);
  static_assert(sizeof(Int16Cell) <= sizeof(Cell) && alignof(Int16Cell) == alignof(Cell), "they share memory");
  chunk->cells = workspace.take<Cell>(ceil_div(tokens, kBlockTokens) * kTileCells);
  chunk->integer_cells = reinterpret_cast<Int16Cell*>(chunk->cells);
  int64_t linear_bytes = linear_forward_workspace_bytes(format, tokens, rows, hidden_size);
  // The tails may need more than the full tile does: a narrow product may take another path.
  linear_bytes = std::max(linear_bytes, linear_forward_workspace_bytes(format, tokens, 1, hidden_size));
  chunk->linear = workspace.take<char>(linear_bytes);
  return workspace.used_bytes();
}

// A token whose hidden state is not finite is taken out for good: its running sum becomes NaN, and so does its loss.
void retire_non_finite_tokens(const Chunk& chunk) {
  parallel_for(chunk.num_tokens, [&](int64_t t) {
    const float* h = chunk.hidden + t * chunk.hidden_size;
    float probe = 0;
    for (int64_t d = 0; d < chunk.hidden_size; ++d) probe += h[d] * 0.0f;
    if (std::isnan(probe)) chunk.running_max[t] = chunk.running_sum[t] = std::numeric_limits<float>::quiet_NaN();
  });
}

void fill_cells(const Chunk& chunk, int64_t block, int64_t num_rows, const float** e, const float* least) {
  const FillCell fill_cell = select(kFillCell);
  for (int64_t row = 0, index = block * kTileCells; row < num_rows; row += kCellRows, ++index) {
    const int64_t count = std::min(kCellRows, num_rows - row);
    if (chunk.integer) {
      Cell cell;
      fill_cell(e, count, least, &cell);
      select(kQuantizeCell)(cell, &chunk.integer_cells[index]);
    } else {
      fill_cell(e, count, least, &chunk.cells[index]);
    }
    for (int64_t t = 0; t < kBlockTokens; ++t) e[t] += count;
  }
}

// Phase 2 for the tokens of one block: note the target's logit, then logits -> exp(z - max), then the cells. The
// target itself is left out of the cells: finish adds (p - 1) times its row, exactly.
void weigh_block(const Chunk& chunk, int64_t block, int64_t first_row, int64_t num_rows) {
  static constexpr float kNoWeight[kVocabularyTile] = {};
  const SoftmaxRow softmax_row = select(kSoftmaxRow);
  const float* e[kBlockTokens] = {kNoWeight, kNoWeight, kNoWeight, kNoWeight};
  float least[kBlockTokens] = {1, 1, 1, 1};
  const int64_t first_token = block * kBlockTokens;
  const int64_t count = std::min(kBlockTokens, chunk.num_tokens - first_token);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = first_token + i;
    chunk.rescale[t] = 1.0f;
    if (std::isnan(chunk.running_sum[t])) continue;
    float* z = chunk.logits + t * num_rows;
    const int64_t target = chunk.targets[t] - first_row;
    const bool has_target = target >= 0 && target < num_rows;
    if (has_target) chunk.target_logit[t] = z[target];
    chunk.rescale[t] = softmax_row(z, num_rows, &chunk.running_max[t], &chunk.running_sum[t]);
    if (std::isnan(chunk.running_sum[t])) continue;
    if (has_target) z[target] = 0.0f;
    e[i] = z;
    least[i] = std::max(chunk.cutoff * chunk.running_sum[t], std::numeric_limits<float>::min());
  }
  if (chunk.grad != nullptr) fill_cells(chunk, block, num_rows, e, least);
}

// The cells of one column of cells lie far apart, and so do their rows of the gradient: both are on their way while the
// block before is multiplied.
template <typename AnyCell>
void prefetch_block(const Chunk& chunk, const AnyCell* cells, int64_t cell_index, int64_t block, int64_t first_col) {
  if (block >= chunk.num_blocks()) return;
  const auto* cell = reinterpret_cast<const char*>(&cells[block * kTileCells + cell_index]);
  for (size_t i = 0; i < sizeof(AnyCell); i += 64) __builtin_prefetch(cell + i);
  const int64_t first_token = block * kBlockTokens;
  for (int64_t t = first_token; t < std::min(first_token + kBlockTokens, chunk.num_tokens); ++t) {
    const float* row = chunk.grad + t * chunk.hidden_size + first_col;
    __builtin_prefetch(row, 1);
    __builtin_prefetch(row + 16, 1);
  }
}

// accumulate(block, rows) adds one cell's product to 32 columns of 4 gradient rows; the edges go through a copy.
template <typename Accumulate>
void accumulate_blocks(const Chunk& chunk, int64_t first_col, int64_t num_cols, Accumulate accumulate) {
  for (int64_t block = 0; block < chunk.num_blocks(); ++block) {
    const int64_t first_token = block * kBlockTokens;
    const int64_t count = std::min(kBlockTokens, chunk.num_tokens - first_token);
    float* rows[kBlockTokens];
    for (int64_t i = 0; i < count; ++i) rows[i] = chunk.grad + (first_token + i) * chunk.hidden_size + first_col;
    if (count == kBlockTokens && num_cols == kPanelCols) {
      accumulate(block, rows);
      continue;
    }
    float edge[kBlockTokens][kPanelCols] = {};
    float* edge_rows[kBlockTokens] = {edge[0], edge[1], edge[2], edge[3]};
    for (int64_t i = 0; i < count; ++i) std::copy(rows[i], rows[i] + num_cols, edge[i]);
    accumulate(block, edge_rows);
    for (int64_t i = 0; i < count; ++i) std::copy(edge[i], edge[i] + num_cols, rows[i]);
  }
}

// grad[tokens, panel] += the cells of one column of cells * their panel.
void accumulate_panel(const Chunk& chunk, int64_t cell_index, const float* panel, int64_t num_rows, int64_t first_col,
                      int64_t num_cols) {
  if (!chunk.integer) {
    const AccumulateCell accumulate_cell = select(kAccumulateCell);
    accumulate_blocks(chunk, first_col, num_cols, [&](int64_t block, float* const* rows) {
      prefetch_block(chunk, chunk.cells, cell_index, block + 1, first_col);
      accumulate_cell(chunk.cells[block * kTileCells + cell_index], panel, rows);
    });
    return;
  }
  Int16Panel integer_panel;
  select(kQuantizePanel)(panel, num_rows, &integer_panel);
  const AccumulateInt16 accumulate_int16 = select(kAccumulateInt16);
  accumulate_blocks(chunk, first_col, num_cols, [&](int64_t block, float* const* rows) {
    prefetch_block(chunk, chunk.integer_cells, cell_index, block + 1, first_col);
    accumulate_int16(chunk.integer_cells[block * kTileCells + cell_index], integer_panel, rows);
  });
}

// Phase 3 for kPanelCols columns of the gradient.
void update_grad_columns(const Chunk& chunk, const MatrixView& shard, int64_t first_row, int64_t num_rows,
                         int64_t first_col) {
  alignas(64) float panel[(kCellRows + 1) * kPanelCols];
  const int64_t num_cols = std::min(kPanelCols, chunk.hidden_size - first_col);
  for (int64_t t = 0; t < chunk.num_tokens; ++t) {
    if (chunk.rescale[t] == 1.0f) continue;
    float* g = chunk.grad + t * chunk.hidden_size + first_col;
    for (int64_t c = 0; c < num_cols; ++c) g[c] *= chunk.rescale[t];
  }
  for (int64_t row = 0, c = 0; row < num_rows; row += kCellRows, ++c) {
    const int64_t count = std::min(kCellRows, num_rows - row);
    decode_panel(shard, first_row + row, count, first_col, panel);
    float* mean = panel + kMeanRow * kPanelCols;
    std::fill(mean, mean + kPanelCols, 0.0f);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < kPanelCols; ++i) mean[i] += panel[r * kPanelCols + i];
    }
    for (int64_t i = 0; i < kPanelCols; ++i) mean[i] /= static_cast<float>(count);
    accumulate_panel(chunk, c, panel, count, first_col, num_cols);
  }
}

void update_chunk(const Chunk& chunk, const MatrixView& shard, int64_t first_row, Activation activation) {
  retire_non_finite_tokens(chunk);
  static_assert(kChunkTokens <= kMaxPackedTokens, "a chunk is packed as a whole");
  linear_pack(shard, chunk.hidden, chunk.num_tokens, activation, chunk.linear);
  for (int64_t row = 0; row < shard.num_rows; row += kVocabularyTile) {
    const int64_t num_rows = std::min(kVocabularyTile, shard.num_rows - row);
    linear_forward_packed(row_range(shard, row, num_rows), chunk.hidden, chunk.num_tokens, activation, chunk.logits,
                          chunk.linear);
    parallel_for(chunk.num_blocks(), [&](int64_t block) { weigh_block(chunk, block, first_row + row, num_rows); });
    if (chunk.grad == nullptr) continue;
    parallel_for(ceil_div(chunk.hidden_size, kPanelCols),
                 [&](int64_t p) { update_grad_columns(chunk, shard, row, num_rows, p * kPanelCols); });
  }
}

}  // namespace

int64_t cross_entropy_workspace_bytes(BlockFormat format, int64_t num_tokens, int64_t num_rows, int64_t hidden_size) {
  Workspace workspace(nullptr);
  Chunk chunk{};
  return carve(workspace, format, num_tokens, num_rows, hidden_size, &chunk);
}

void cross_entropy_update(const MatrixView& shard, int64_t first_row, const float* hidden, const int64_t* targets,
                          int64_t num_tokens, Activation activation, float* running_max, float* running_sum,
                          float* target_logit, float* grad, float* target_row, void* workspace) {
  const int64_t hidden_size = shard.num_cols;
  Workspace pieces(workspace);
  Chunk chunk{};
  carve(pieces, shard.format, num_tokens, shard.num_rows, hidden_size, &chunk);
  chunk.hidden_size = hidden_size;
  chunk.integer =
      activation == Activation::int8 && shard.format != BlockFormat::bf16 && shard.format != BlockFormat::f32;
  chunk.cutoff = activation == Activation::int8 ? kCutoffInt8 : kCutoffF32;
  for (int64_t t = 0; t < num_tokens; t += kChunkTokens) {
    chunk.num_tokens = std::min(kChunkTokens, num_tokens - t);
    chunk.hidden = hidden + t * hidden_size;
    chunk.targets = targets + t;
    chunk.running_max = running_max + t;
    chunk.running_sum = running_sum + t;
    chunk.target_logit = target_logit + t;
    chunk.grad = grad == nullptr ? nullptr : grad + t * hidden_size;
    update_chunk(chunk, shard, first_row, activation);
  }
  if (grad == nullptr) return;
  parallel_for(num_tokens, [&](int64_t t) {
    const int64_t target = targets[t] - first_row;
    if (target >= 0 && target < shard.num_rows) gather_rows(shard, &target, 1, target_row + t * hidden_size);
  });
}

void cross_entropy_finish(int64_t num_tokens, int64_t hidden_size, const float* running_max, const float* running_sum,
                          const float* target_logit, const float* token_weight, float* loss, float* grad,
                          const float* target_row) {
  parallel_for(num_tokens, [&](int64_t t) {
    loss[t] = running_max[t] + std::log(running_sum[t]) - target_logit[t];
    if (grad == nullptr) return;
    const float weight = token_weight == nullptr ? 1.0f : token_weight[t];
    const float scale = weight / running_sum[t];
    const float target_scale = weight * (std::exp(target_logit[t] - running_max[t]) / running_sum[t] - 1.0f);
    float* g = grad + t * hidden_size;
    const float* row = target_row + t * hidden_size;
    for (int64_t d = 0; d < hidden_size; ++d) g[d] = g[d] * scale + target_scale * row[d];
  });
}

}  // namespace chainfed

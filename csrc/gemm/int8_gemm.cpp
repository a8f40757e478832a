#include "gemm/int8_gemm.h"

#include <algorithm>
#include <cstring>

#include "base/fetch_rows.h"
#include "base/simd_level.h"
#include "base/thread_pool.h"
#include "base/workspace.h"
#include "quant/tile.h"

namespace chainfed {
namespace {

constexpr SimdTable<const Int8Level*> kTable =
    CHAINFED_LEVELS(&kInt8Scalar, &kInt8Avx2, &kInt8Avx512Vnni, &kInt8Neon, &kInt8Dotprod, &kInt8I8mm);

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Chunk {
  const Int8Level& level;
  const Int8Kernels& kernels;
  const MatrixView& w;
  const uint8_t* groups;
  int64_t num_tokens, num_tiles;
  const float* bias;
  float* out;  // of the chunk's first token
};

// Tasks [begin, end): panels, and parts of the groups of tokens. Their sums are [task][token][row].
struct Batch {
  int64_t begin, end, num_parts;
  int64_t panel(int64_t task) const { return task / num_parts; }
  int64_t first_group(int64_t task, int64_t num_groups) const { return num_groups * (task % num_parts) / num_parts; }
  int64_t end_group(int64_t task, int64_t num_groups) const { return num_groups * (task % num_parts + 1) / num_parts; }
};

// Where a block's sums come from and go to: the bias before the first block, out after the last, between them `sums`. A
// panel that sticks out of the matrix goes to out through `edge`.
void multiply_group(const Chunk& chunk, const WeightBlock& weights, int64_t panel, int64_t group, int64_t first_tile,
                    int64_t num_tiles, const float* start, float* sums) {
  const int64_t group_tokens = chunk.level.group_tokens, panel_rows = chunk.level.panel_rows;
  const int64_t token = group * group_tokens, tokens = std::min(group_tokens, chunk.num_tokens - token);
  const int64_t tile_bytes = group_tile_bytes(group_tokens, chunk.kernels.code_bytes);
  const uint8_t* activations = chunk.groups + (group * chunk.num_tiles + first_tile) * tile_bytes;
  const float* from = first_tile == 0 ? start : sums;
  const int64_t from_stride = first_tile == 0 ? 0 : panel_rows;
  const auto multiply = [&](float* to, int64_t to_stride) {
    chunk.kernels.multiply(weights, activations, num_tiles, tokens, from, from_stride, to, to_stride);
  };
  if (first_tile + num_tiles < chunk.num_tiles) return multiply(sums, panel_rows);
  const int64_t num_rows = chunk.w.num_rows, row = panel * panel_rows, width = std::min(panel_rows, num_rows - row);
  float* out = chunk.out + token * num_rows + row;
  if (width == panel_rows) {
    fetch_rows(out, num_rows, tokens, panel_rows);
    return multiply(out, num_rows);
  }
  alignas(64) float edge[kMaxGroupTokens * kWidePanelRows];
  multiply(edge, panel_rows);
  for (int64_t t = 0; t < tokens; ++t) std::memcpy(out + t * num_rows, edge + t * panel_rows, width * sizeof(float));
}

void multiply_batch(const Chunk& chunk, const Batch& batch, float* sums) {
  const int64_t group_tokens = chunk.level.group_tokens, panel_rows = chunk.level.panel_rows;
  const int64_t num_groups = divide_up(chunk.num_tokens, group_tokens);
  // Blocks of equal size, or 18 tiles would be 16 and an expensive 2.
  const int64_t block_tiles = divide_up(chunk.num_tiles, divide_up(chunk.num_tiles, kInt8BlockTiles));
  alignas(64) WeightBlock weights;
  alignas(64) float start[kWidePanelRows] = {};
  for (int64_t first_tile = 0; first_tile < chunk.num_tiles; first_tile += block_tiles) {
    const int64_t num_tiles = std::min(block_tiles, chunk.num_tiles - first_tile);
    for (int64_t task = batch.begin; task < batch.end; ++task) {
      const int64_t panel = batch.panel(task), row = panel * panel_rows;
      chunk.kernels.unpack(chunk.w, panel, first_tile, num_tiles, &weights);
      if (chunk.bias != nullptr && first_tile == 0) {
        std::copy(chunk.bias + row, chunk.bias + std::min(row + panel_rows, chunk.w.num_rows), start);
      }
      const int64_t begin = batch.first_group(task, num_groups);
      for (int64_t g = begin; g < batch.end_group(task, num_groups); ++g) {
        const int64_t place = (task - batch.begin) * kInt8ChunkTokens + (g - begin) * group_tokens;
        multiply_group(chunk, weights, panel, g, first_tile, num_tiles, start, sums + place * panel_rows);
      }
    }
  }
}

void multiply_chunk(const Chunk& chunk) {
  const int64_t num_panels = divide_up(chunk.w.num_rows, chunk.level.panel_rows);
  const int64_t num_groups = divide_up(chunk.num_tokens, chunk.level.group_tokens);
  // Few panels: share the groups out too, and let each part unpack the panel for itself.
  const int64_t num_parts = std::clamp<int64_t>(divide_up(2 * num_threads(), num_panels), 1, num_groups);
  const int64_t batch_tasks = kInt8SumRows / chunk.level.panel_rows;
  parallel_ranges(num_panels * num_parts, [&](int64_t begin, int64_t end, int) {
    alignas(64) float sums[kInt8SumRows * kInt8ChunkTokens];
    for (int64_t task = begin; task < end; task += batch_tasks) {
      multiply_batch(chunk, {task, std::min(end, task + batch_tasks), num_parts}, sums);
    }
  });
}

}  // namespace

void int8_pack(const MatrixView& w, const float* x, int64_t num_tokens, void* workspace) {
  const Int8Level& level = *select(kTable);
  const Int8Kernels& kernels = level.kernels[static_cast<int>(w.format)];
  const int64_t num_tiles = tiles_per_row(w), group_tokens = level.group_tokens;
  auto* groups = static_cast<uint8_t*>(workspace);
  parallel_for(divide_up(num_tokens, group_tokens), [&](int64_t g) {
    const int64_t first = g * group_tokens;
    kernels.pack(x + first * w.num_cols, std::min(group_tokens, num_tokens - first), w.num_cols, num_tiles,
                 groups + g * num_tiles * group_tile_bytes(group_tokens, kernels.code_bytes));
  });
}

void int8_forward_packed(const MatrixView& w, int64_t num_tokens, const float* bias, float* out,
                         const void* workspace) {
  const Int8Level& level = *select(kTable);
  multiply_chunk({level, level.kernels[static_cast<int>(w.format)], w, static_cast<const uint8_t*>(workspace),
                  num_tokens, tiles_per_row(w), bias, out});
}

void int8_forward(const MatrixView& w, const float* x, int64_t num_tokens, const float* bias, float* out,
                  void* workspace) {
  for (int64_t token = 0; token < num_tokens; token += kInt8ChunkTokens) {
    const int64_t tokens = std::min(kInt8ChunkTokens, num_tokens - token);
    int8_pack(w, x + token * w.num_cols, tokens, workspace);
    int8_forward_packed(w, tokens, bias, out + token * w.num_rows, workspace);
  }
}

int64_t int8_workspace_bytes(BlockFormat format, int64_t num_tokens, int64_t num_cols) {
  // The last group is filled up; sizes of groups and codes differ between SIMD levels, and this bound holds for all.
  const int64_t tokens = std::min(num_tokens, kInt8ChunkTokens) + kMaxGroupTokens - 1;
  const int64_t code_bytes = format == BlockFormat::int8 ? 2 : 1;
  Workspace measured(nullptr);
  measured.take<uint8_t>(padded_cols(format, num_cols) / kTileCols * group_tile_bytes(tokens, code_bytes));
  return measured.used_bytes();
}

}  // namespace chainfed

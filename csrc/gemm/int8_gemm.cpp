#include "gemm/int8_gemm.h"

#include <algorithm>
#include <cstring>

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

// A panel that sticks out of the matrix goes through `edge`.
void multiply_group(const Chunk& chunk, const WeightTile* tiles, int64_t panel, int64_t group, int64_t first_tile,
                    int64_t num_tiles, const float* start) {
  const int64_t group_tokens = chunk.level.group_tokens, num_rows = chunk.w.num_rows;
  const int64_t token = group * group_tokens, tokens = std::min(group_tokens, chunk.num_tokens - token);
  const uint8_t* activations = chunk.groups + (group * chunk.num_tiles + first_tile) * group_tile_bytes(group_tokens);
  const int64_t row = panel * kInt8PanelRows, width = std::min(kInt8PanelRows, num_rows - row);
  float* out = chunk.out + token * num_rows + row;
  if (width == kInt8PanelRows) {
    chunk.kernels.multiply(tiles, activations, num_tiles, tokens, start, out, num_rows);
    return;
  }
  alignas(64) float edge[kMaxGroupTokens * kInt8PanelRows] = {};
  for (int64_t t = 0; start == nullptr && t < tokens; ++t) {
    std::memcpy(edge + t * kInt8PanelRows, out + t * num_rows, width * sizeof(float));
  }
  chunk.kernels.multiply(tiles, activations, num_tiles, tokens, start, edge, kInt8PanelRows);
  for (int64_t t = 0; t < tokens; ++t) {
    std::memcpy(out + t * num_rows, edge + t * kInt8PanelRows, width * sizeof(float));
  }
}

void multiply_chunk(const Chunk& chunk) {
  const int64_t num_panels = divide_up(chunk.w.num_rows, kInt8PanelRows);
  const int64_t num_groups = divide_up(chunk.num_tokens, chunk.level.group_tokens);
  // Few panels: share the groups out too, and let each part unpack the panel for itself.
  const int64_t num_parts = std::clamp<int64_t>(divide_up(2 * num_threads(), num_panels), 1, num_groups);
  // Blocks of equal size, or 18 tiles would be 16 and an expensive 2.
  const int64_t block_tiles = divide_up(chunk.num_tiles, divide_up(chunk.num_tiles, kInt8BlockTiles));
  parallel_ranges(num_panels * num_parts, [&](int64_t begin, int64_t end, int) {
    alignas(64) WeightTile tiles[kInt8BlockTiles];
    alignas(64) float start[kInt8PanelRows];
    for (int64_t first_tile = 0; first_tile < chunk.num_tiles; first_tile += block_tiles) {
      const int64_t num_tiles = std::min(block_tiles, chunk.num_tiles - first_tile);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t panel = task / num_parts, part = task % num_parts;
        chunk.kernels.unpack(chunk.w, panel, first_tile, num_tiles, tiles);
        for (int64_t n = 0; n < kInt8PanelRows; ++n) {
          const int64_t row = panel * kInt8PanelRows + n;
          start[n] = chunk.bias != nullptr && row < chunk.w.num_rows ? chunk.bias[row] : 0.0f;
        }
        for (int64_t g = num_groups * part / num_parts; g < num_groups * (part + 1) / num_parts; ++g) {
          multiply_group(chunk, tiles, panel, g, first_tile, num_tiles, first_tile == 0 ? start : nullptr);
        }
      }
    }
  });
}

}  // namespace

void int8_pack(const MatrixView& w, const float* x, int64_t num_tokens, void* workspace) {
  const Int8Level& level = *select(kTable);
  const int64_t num_tiles = tiles_per_row(w), group_tokens = level.group_tokens;
  auto* groups = static_cast<uint8_t*>(workspace);
  parallel_for(divide_up(num_tokens, group_tokens), [&](int64_t g) {
    const int64_t first = g * group_tokens;
    level.pack(x + first * w.num_cols, std::min(group_tokens, num_tokens - first), w.num_cols, num_tiles,
               groups + g * num_tiles * group_tile_bytes(group_tokens));
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
  // The last group is filled up; group sizes differ between SIMD levels, and this bound holds for all.
  const int64_t tokens = std::min(num_tokens, kInt8ChunkTokens) + kMaxGroupTokens - 1;
  Workspace measured(nullptr);
  measured.take<uint8_t>(padded_cols(format, num_cols) / kTileCols * group_tile_bytes(tokens));
  return measured.used_bytes();
}

}  // namespace chainfed

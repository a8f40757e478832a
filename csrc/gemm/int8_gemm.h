// The forward product with activations quantised to int8 per 32 inputs, for tiled weights (int4, nf4, int8):
//   out[t][n] = bias[n] + sum over tiles of  d[n] sx[t] dot(q[n], qx[t]) + m[n] s[t],   s = sx * (sum of qx).
// d, m: scale and offset of the weight's row in the tile; sx, qx: scale and codes of the token's 32 inputs.
//
// Three steps a chunk of at most 256 tokens: the activations are packed in groups of tokens; then, for 16 input tiles
// (512 inputs) at a time, two row tiles of weights are unpacked to bytes on the stack (10 KiB) and multiplied with all
// groups. A token's result depends on neither the other tokens nor the number of threads.
//
// A token with a NaN or Inf among 32 inputs gets sx = NaN there, so that its whole output row is NaN.
#pragma once
#include <cstdint>

#include "chainfed/block_format.h"

namespace chainfed {

constexpr int64_t kInt8ChunkTokens = 256;
constexpr int64_t kInt8PanelRows = 16;
constexpr int64_t kInt8BlockTiles = 16;
constexpr int64_t kMaxGroupTokens = 8;

// One tile column of a panel of unpacked weights: byte [j][row][i] is the code of (row, column 4j + i); i8mm keeps
// eight columns of a row together, and AVX2's int8 takes 16 bits a code (see the levels' files).
struct WeightTile {
  uint8_t codes[2 * 8 * kInt8PanelRows * 4];
  float scale[kInt8PanelRows], offset[kInt8PanelRows];
};
// One tile column of a group of G tokens: int8 codes [G][32], then f32 sx [G], then f32 s [G].
constexpr int64_t group_tile_bytes(int64_t group_tokens) { return group_tokens * (kTileCols + 8); }

struct Int8Kernels {
  // Row tiles 2 * panel and 2 * panel + 1 (zero where the matrix has no such rows).
  void (*unpack)(const MatrixView& w, int64_t panel, int64_t first_tile, int64_t num_tiles, WeightTile* tiles);
  // out[t * row_stride + n] = start[n] + the sum over num_tiles; start null: added to out. num_tokens <= G.
  void (*multiply)(const WeightTile* tiles, const uint8_t* group, int64_t num_tiles, int64_t num_tokens,
                   const float* start, float* out, int64_t row_stride);
};

struct Int8Level {
  int64_t group_tokens;  // G
  // One group: num_tokens rows of x (the rest of the group is zero), num_tiles tile columns, zero beyond num_cols.
  void (*pack)(const float* x, int64_t num_tokens, int64_t num_cols, int64_t num_tiles, uint8_t* group);
  Int8Kernels kernels[3];  // by BlockFormat: int4, nf4, int8
};
extern const Int8Level kInt8Scalar, kInt8Avx2, kInt8Avx512Vnni, kInt8Neon, kInt8Dotprod, kInt8I8mm;

void int8_forward(const MatrixView& w, const float* x, int64_t num_tokens, const float* bias, float* out,
                  void* workspace);
// The two halves of int8_forward for at most kInt8ChunkTokens rows: packing depends on w's format and width alone.
void int8_pack(const MatrixView& w, const float* x, int64_t num_tokens, void* workspace);
void int8_forward_packed(const MatrixView& w, int64_t num_tokens, const float* bias, float* out, const void* workspace);
int64_t int8_workspace_bytes(BlockFormat format, int64_t num_tokens, int64_t num_cols);

}  // namespace chainfed

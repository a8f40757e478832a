// The forward product with activations quantised to int8 per 32 inputs, for tiled weights (int4, nf4, int8):
//   out[t][n] = bias[n] + sum over tiles of  d[n] sx[t] dot(q[n], qx[t]) + m[n] s[t],   s = sx * (sum of qx).
// d, m: scale and offset of the weight's row in the tile; sx, qx: scale and codes of the token's 32 inputs.
//
// Three steps a chunk of at most 256 tokens: the activations are packed in groups of tokens; then, for up to 16 input
// tiles (512 inputs) at a time, a panel of 16 or 32 rows is unpacked to bytes on the stack and multiplied with all
// groups. Between blocks the sums of up to 128 rows stay in one array of the thread, because rows of out lie a page or
// more apart; the last block writes out. A token's result depends on neither the other tokens nor the number of
// threads.
//
// A token with a NaN or Inf among 32 inputs gets sx = NaN there, so that its whole output row is NaN.
#pragma once
#include <cstdint>

#include "chainfed/block_format.h"

namespace chainfed {

constexpr int64_t kInt8ChunkTokens = 256;
constexpr int64_t kInt8BlockTiles = 16;
constexpr int64_t kMaxGroupTokens = 8;
constexpr int64_t kInt8PanelRows = 16;  // of levels with a WeightTile a tile
constexpr int64_t kWidePanelRows = 32;  // of levels with a WideBlock
constexpr int64_t kInt8SumRows = 128;   // rows whose sums a thread holds at a time

// One tile column of a panel of unpacked weights: byte [j][row][i] is the code of (row, column 4j + i); i8mm keeps
// eight columns of a row together, and AVX2's int8 takes 16 bits a code (see the levels' files).
struct WeightTile {
  uint8_t codes[2 * 8 * kInt8PanelRows * 4];
  float scale[kInt8PanelRows], offset[kInt8PanelRows];
};
// All tile columns of a block with one scale a row, for levels whose last step from int16 to int32 is a multiplication:
//   weight = scale * factor * code + offset, the tile's factor an integer that stands twice in 32 bits.
struct FactorTile {
  uint8_t codes[8 * kInt8PanelRows * 4];
  int32_t factor[kInt8PanelRows];
  float offset[kInt8PanelRows];
};
struct FactorBlock {
  FactorTile tiles[kInt8BlockTiles];
  float scale[kInt8PanelRows];
};
// All tile columns of a block brought to one scale a row: weight = scale * (code - 128); codes [tile][j][row][i].
struct WideBlock {
  uint8_t codes[kInt8BlockTiles][8 * kWidePanelRows * 4];
  float scale[kWidePanelRows];
};
union WeightBlock {
  WeightTile tiles[kInt8BlockTiles];
  FactorBlock factors;
  WideBlock wide;
};
// One tile column of a group of G tokens: codes [G][32] of one byte or two, then f32 sx [G], then f32 s [G]; for a
// WideBlock, in place of s, int32 -128 * (sum of qx).
constexpr int64_t group_tile_bytes(int64_t group_tokens, int64_t code_bytes = 1) {
  return group_tokens * (kTileCols * code_bytes + 8);
}

struct Int8Kernels {
  int64_t code_bytes;  // of an activation; 2 at most, and for int8 weights alone
  // One group: num_tokens rows of x (the rest of the group is zero), num_tiles tile columns, zero beyond num_cols.
  void (*pack)(const float* x, int64_t num_tokens, int64_t num_cols, int64_t num_tiles, uint8_t* group);
  // Rows panel * panel_rows .. + panel_rows - 1 (zero where the matrix has no such row tiles).
  void (*unpack)(const MatrixView& w, int64_t panel, int64_t first_tile, int64_t num_tiles, WeightBlock* weights);
  // to[t * to_stride + n] = from[t * from_stride + n] + the sum over num_tiles. num_tokens <= G; from may be to.
  void (*multiply)(const WeightBlock& weights, const uint8_t* group, int64_t num_tiles, int64_t num_tokens,
                   const float* from, int64_t from_stride, float* to, int64_t to_stride);
};

struct Int8Level {
  int64_t group_tokens;  // G
  int64_t panel_rows;
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

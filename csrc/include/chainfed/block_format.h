// How a frozen matrix W [num_rows N, num_cols K] (out features x in features) lies in memory and on disk.
//
// Quantised formats share one tile: 8 rows x 32 columns. Rows are padded to a multiple of 8, columns to a
// multiple of 32 (nf4: 64) with codes that decode to finite values nobody reads. Tiles are stored row-of-tiles
// by row-of-tiles: tile(rt, ct) is at index rt * (Kp / 32) + ct, so eight rows are one contiguous run.
//
//   int4  codes  u8  [Np/8, Kp/32, 128]   byte[j*32 + r*4 + i] = q[r][4j+i] | q[r][16+4j+i] << 4,
//                                         j in 0..3, r in 0..7 (row in tile), i in 0..3; q unsigned 0..15
//         scales f16 [Np/8, Kp/32, 16]    8 scales d[r], then 8 offsets m[r];   w = d * q + m   (5.0 bits a weight)
//   nf4   codes  u8  [Np/8, Kp/32, 128]   same nibble order; q indexes the NF4 table
//         scales f32 [Np/8, Kp/64, 8]     absmax[r] of 64 inputs;  w = absmax * table[q]        (4.5 bits)
//   int8  codes  i8  [Np/8, Kp/32, 256]   byte[j*32 + r*4 + i] = q[r][4j+i], j in 0..7; q in -127..127
//         scales f16 [Np/8, Kp/32, 8]     d[r];  w = d * q                                     (8.5 bits)
//   bf16  codes  bf16 [N, K] row-major, no scales, no padding
//   f32   codes  f32  [N, K] row-major, no scales, no padding
//
// codes start at 64-byte alignment, scales at 32-byte alignment.
#pragma once
#include <cstddef>
#include <cstdint>

namespace chainfed {

enum class BlockFormat : uint8_t { int4, nf4, int8, bf16, f32 };

constexpr int64_t kTileRows = 8;
constexpr int64_t kTileCols = 32;
constexpr int64_t kNf4BlockCols = 64;
constexpr int64_t kInt4TileBytes = 128;
constexpr int64_t kInt8TileBytes = 256;

// A matrix somebody else owns (a layer buffer or a caller's arrays). Kernels trust it.
struct MatrixView {
  BlockFormat format;
  int64_t num_rows;    // N, without padding
  int64_t num_cols;    // K, without padding
  const void* codes;   // layout above
  const void* scales;  // layout above; null for bf16 and f32
};

int64_t padded_rows(BlockFormat format, int64_t num_rows);
int64_t padded_cols(BlockFormat format, int64_t num_cols);
// Sizes in bytes; throw InvalidArgument when num_rows or num_cols is < 1 or a product overflows int64.
int64_t codes_bytes(BlockFormat format, int64_t num_rows, int64_t num_cols);
int64_t scales_bytes(BlockFormat format, int64_t num_rows, int64_t num_cols);
BlockFormat parse_block_format(const char* name);  // throws InvalidArgument naming the five
const char* block_format_name(BlockFormat format);

}  // namespace chainfed

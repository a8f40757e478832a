// From the tiles of block_format.h to fragments of mma_f16. A word is the 4 bytes [j][r] of a tile: row r's codes of
// columns 4j..4j+3 (int4, nf4: in the low nibbles, columns 16+4j.. in the high ones). Products do not care in which
// order the summed index runs as long as both sides agree, so activations are stored once in the order in which the
// codes fall out of a word ("order"), and a lane finds the 8 values of 32 that it needs for two mma steps side by side:
//   forward (sum over columns)  position 8t + 2q + e  holds column 16 (q & 1) + 4t + (q >> 1) + 2e
//   grad    (sum over rows)     position 8t + 2a + e  holds row    8a + 2t + e  of four tiles of 8 rows
// with t = lane % 4 and e the half of a register.
#pragma once
#include <cstdint>

#include "chainfed/block_format.h"
#include "cuda/calls.h"
#include "cuda/device.h"

namespace chainfed::cuda {

CHAINFED_HOST_DEVICE inline int source_of_position(Direction direction, int position) {
  const int t = position >> 3, pair = position >> 1 & 3, e = position & 1;
  if (direction == Direction::forward) return 16 * (pair & 1) + 4 * t + (pair >> 1) + 2 * e;
  return 8 * pair + 2 * t + e;
}

// Which of the 64 columns of a warp's output the accumulator `c` (0..7) of fragment column n (0..7) belongs to.
CHAINFED_HOST_DEVICE inline int output_of_fragment(Direction direction, int c, int n) {
  if (direction == Direction::forward) return 8 * c + n;
  return 32 * (n >> 2) + 16 * (c & 1) + 4 * (n & 3) + 2 * (c >> 2) + (c >> 1 & 1);
}

// Sizes of a format's tiles; kScaleTiles tiles of a row share one block of kScaleBytes.
template <BlockFormat Format>
struct TileTraits;
template <>
struct TileTraits<BlockFormat::int4> {
  static constexpr int kTileBytes = 128, kScaleBytes = 32, kScaleTiles = 1, kTableWords = 0;
};
template <>
struct TileTraits<BlockFormat::nf4> {
  static constexpr int kTileBytes = 128, kScaleBytes = 32, kScaleTiles = 2, kTableWords = 256;
};
template <>
struct TileTraits<BlockFormat::int8> {
  static constexpr int kTileBytes = 256, kScaleBytes = 16, kScaleTiles = 1, kTableWords = 0;
};

// The same half twice.
CHAINFED_DEVICE uint32_t twice(uint16_t half) { return half * 0x10001u; }
CHAINFED_DEVICE uint32_t halves(float low, float high) {
  return static_cast<uint32_t>(half_bits(high)) << 16 | half_bits(low);
}

// Values of an eight-row block's scale words as pairs of halves for rows (row0, row0 + 1), or twice row0.
struct ScalePair {
  uint32_t scale, offset;
};

template <BlockFormat Format>
CHAINFED_DEVICE ScalePair scales_of_row(const unsigned char* block, int row) {
  if constexpr (Format == BlockFormat::nf4) {
    return {twice(half_bits(reinterpret_cast<const float*>(block)[row])), 0};
  } else {
    const auto* scales = reinterpret_cast<const uint16_t*>(block);
    return {twice(scales[row]), Format == BlockFormat::int4 ? twice(scales[8 + row]) : 0};
  }
}

// row is even.
template <BlockFormat Format>
CHAINFED_DEVICE ScalePair scales_of_two_rows(const unsigned char* block, int row) {
  if constexpr (Format == BlockFormat::nf4) {
    const auto* absmax = reinterpret_cast<const float*>(block) + row;
    return {halves(absmax[0], absmax[1]), 0};
  } else {
    const auto* scales = reinterpret_cast<const uint32_t*>(block) + row / 2;
    return {scales[0], Format == BlockFormat::int4 ? scales[4] : 0};
  }
}

// The four pairs of nibbles at bits 4i and 16 + 4i of `word` as weights, i = 0..3. table: nf4_pair_table.
template <BlockFormat Format>
CHAINFED_DEVICE void decode_nibbles(uint32_t word, ScalePair s, const uint32_t* table, uint32_t (&out)[4]) {
  if constexpr (Format == BlockFormat::int4) {
    // 0x6400 is 1024, whose last bit is worth 1: or-ing a nibble in adds it exactly; a nibble four bits up adds 16 q.
    constexpr uint32_t kLow = 0x000F000Fu, kHigh = 0x00F000F0u, kMagic = 0x64006400u;
    constexpr uint32_t kMinus1024 = 0xE400E400u, kSixteenth = 0x2C002C00u, kMinus64 = 0xD400D400u;
    const uint32_t upper = word >> 8;
    out[0] = half2_add(mask_or(word, kLow, kMagic), kMinus1024);
    out[1] = half2_fma(mask_or(word, kHigh, kMagic), kSixteenth, kMinus64);
    out[2] = half2_add(mask_or(upper, kLow, kMagic), kMinus1024);
    out[3] = half2_fma(mask_or(upper, kHigh, kMagic), kSixteenth, kMinus64);
    for (int i = 0; i < 4; ++i) out[i] = half2_fma(out[i], s.scale, s.offset);
  } else {
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = word >> 4 * i & 0x000F000Fu;
      out[i] = half2_mul(table[(pair | pair >> 12) & 0xFF], s.scale);
    }
  }
}

// Bytes (0, 2) and (1, 3) of `word` as weights.
CHAINFED_DEVICE void decode_bytes(uint32_t word, uint32_t scale, uint32_t& even, uint32_t& odd) {
  const uint32_t raised = word ^ 0x80808080u;  // q + 128 without a sign
  // 0x64 above each byte makes 1024 + 128 + q.
  constexpr uint32_t kAbove = 0x64646464u, kMinus1152 = 0xE480E480u;
  even = half2_mul(half2_add(byte_permute(raised, kAbove, 0x4240), kMinus1152), scale);
  odd = half2_mul(half2_add(byte_permute(raised, kAbove, 0x4341), kMinus1152), scale);
}

// A lane's weights of tile row r = lane / 4 for two mma steps: {step 0: b[0], b[1]; step 1: b[0], b[1]}.
template <BlockFormat Format>
CHAINFED_DEVICE void forward_fragment(const unsigned char* tile, ScalePair s, int lane, const uint32_t* table,
                                      uint32_t (&out)[4]) {
  const auto* words = reinterpret_cast<const uint32_t*>(tile) + lane % 4 * 8 + lane / 4;
  if constexpr (Format == BlockFormat::int8) {
    decode_bytes(words[0], s.scale, out[0], out[2]);
    decode_bytes(words[32], s.scale, out[1], out[3]);
  } else {
    decode_nibbles<Format>(words[0], s, table, out);
  }
}

// A lane's weights of tile rows 2t, 2t + 1 at the 8 columns of its j = lane / 4 % 4, one register an accumulator.
template <BlockFormat Format>
CHAINFED_DEVICE void grad_fragment(const unsigned char* tile, ScalePair s, int lane, const uint32_t* table,
                                   uint32_t (&out)[8]) {
  const int j = lane / 4 % 4, t = lane % 4;
  const auto* pairs = reinterpret_cast<const Uint2*>(tile) + j * 4 + t;
  const Uint2 rows = pairs[0];
  if constexpr (Format == BlockFormat::int8) {
    const Uint2 more = pairs[16];  // columns 16 + 4j..
    decode_bytes(byte_permute(rows.x, rows.y, 0x5410), s.scale, out[0], out[2]);
    decode_bytes(byte_permute(rows.x, rows.y, 0x7632), s.scale, out[4], out[6]);
    decode_bytes(byte_permute(more.x, more.y, 0x5410), s.scale, out[1], out[3]);
    decode_bytes(byte_permute(more.x, more.y, 0x7632), s.scale, out[5], out[7]);
  } else {
    uint32_t part[4];
    decode_nibbles<Format>(byte_permute(rows.x, rows.y, 0x5410), s, table, part);
    for (int i = 0; i < 4; ++i) out[i] = part[i];
    decode_nibbles<Format>(byte_permute(rows.x, rows.y, 0x7632), s, table, part);
    for (int i = 0; i < 4; ++i) out[4 + i] = part[i];
  }
}

// The NF4 value as f16 bits, rounded from quant/nf4_table.h (a test compares them).
CHAINFED_HOST_DEVICE inline uint16_t nf4_half(int code) {
  static constexpr uint16_t kHalves[16] = {0xBC00, 0xB992, 0xB833, 0xB652, 0xB48D, 0xB1EA, 0xADD4, 0x0000,
                                           0x2D18, 0x3126, 0x33E0, 0x3568, 0x370D, 0x3880, 0x39C9, 0x3C00};
  return kHalves[code];
}

// table[low | high << 4] = the two values side by side.
CHAINFED_DEVICE void fill_nf4_pair_table(uint32_t* table) {
  for (int i = thread_index(); i < 256; i += num_threads()) {
    table[i] = static_cast<uint32_t>(nf4_half(i >> 4)) << 16 | nf4_half(i & 15);
  }
}

}  // namespace chainfed::cuda

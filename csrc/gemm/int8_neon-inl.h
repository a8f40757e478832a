// Packing of activations and unpacking of weights in NEON, shared by the three aarch64 levels (each file compiles its
// own copy; internal linkage). Weights are signed bytes: int4 codes 0..15, nf4 the 8-bit codebook minus 128, int8 as
// stored. An Arrangement says where the bytes of a tile go:
//   Quads   four columns of a row together, [8][row][4]; a token's 32 bytes in order
//   Octets  eight columns of a row together, [4][row][8]; tokens in pairs, [pair][4][2][8]
#pragma once
#include <arm_neon.h>

#include <cstdint>

#include "gemm/int8_gemm.h"
#include "gemm/nf4_codebook.h"
#include "quant/tile.h"

namespace chainfed {
namespace {

constexpr int64_t kGroup = 4;                // tokens, at every level
constexpr float kSmallestAbsmax = 1.5e-36f;  // 127 times the smallest normal f32: below, the 32 inputs count as zero

struct Quads {
  static void store_token(uint8_t* group, int64_t token, int8x16_t first, int8x16_t second) {
    auto* codes = reinterpret_cast<int8_t*>(group) + token * kTileCols;
    vst1q_s8(codes, first);
    vst1q_s8(codes + 16, second);
  }
  // quads[j][h]: columns 4j .. 4j + 3 of rows 4h .. 4h + 3 of one row tile, the first or second of the panel.
  static void store_rows(uint8_t* codes, int64_t half, const uint8x16_t quads[8][2]) {
    for (int j = 0; j < 8; ++j) {
      vst1q_u8(codes + j * 64 + half * 32, quads[j][0]);
      vst1q_u8(codes + j * 64 + half * 32 + 16, quads[j][1]);
    }
  }
};

struct Octets {
  static void store_token(uint8_t* group, int64_t token, int8x16_t first, int8x16_t second) {
    auto* codes = reinterpret_cast<int8_t*>(group) + token / 2 * 64 + token % 2 * 8;
    vst1_s8(codes, vget_low_s8(first));
    vst1_s8(codes + 16, vget_high_s8(first));
    vst1_s8(codes + 32, vget_low_s8(second));
    vst1_s8(codes + 48, vget_high_s8(second));
  }
  static void store_rows(uint8_t* codes, int64_t half, const uint8x16_t quads[8][2]) {
    for (int p = 0; p < 4; ++p) {
      for (int h = 0; h < 2; ++h) {
        const uint32x4_t a = vreinterpretq_u32_u8(quads[2 * p][h]), b = vreinterpretq_u32_u8(quads[2 * p + 1][h]);
        uint8_t* target = codes + p * 128 + half * 64 + h * 32;
        vst1q_u8(target, vreinterpretq_u8_u32(vzip1q_u32(a, b)));
        vst1q_u8(target + 16, vreinterpretq_u8_u32(vzip2q_u32(a, b)));
      }
    }
  }
};

inline int8x16_t codes_of_16(const float* x, float inverse) {
  int32x4_t q[4];
  for (int i = 0; i < 4; ++i) q[i] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 4 * i), inverse));
  const int16x8_t low = vcombine_s16(vqmovn_s32(q[0]), vqmovn_s32(q[1]));
  const int16x8_t high = vcombine_s16(vqmovn_s32(q[2]), vqmovn_s32(q[3]));
  return vcombine_s8(vqmovn_s16(low), vqmovn_s16(high));
}

// 32 inputs of one token: codes, sx, and s = sx * (sum of codes).
template <typename Arrangement>
void pack_32(const float* x, int64_t token, uint8_t* group) {
  // Magnitudes compare as integers, and NaN and Inf lie above all finite values.
  uint32x4_t largest = vdupq_n_u32(0);
  for (int i = 0; i < kTileCols; i += 4) {
    largest = vmaxq_u32(largest, vbicq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), vdupq_n_u32(0x80000000u)));
  }
  const uint32_t bits = vmaxvq_u32(largest);
  float absmax;
  __builtin_memcpy(&absmax, &bits, sizeof absmax);
  int8x16_t first = vdupq_n_s8(0), second = first;
  float scale = 0.0f;
  if (bits >= 0x7F800000u) {
    scale = __builtin_nanf("");
  } else if (absmax >= kSmallestAbsmax) {
    const float inverse = 127.0f / absmax;
    first = codes_of_16(x, inverse);
    second = codes_of_16(x + 16, inverse);
    scale = absmax * (1.0f / 127.0f);
  }
  Arrangement::store_token(group, token, first, second);
  auto* scales = reinterpret_cast<float*>(group + kGroup * kTileCols);
  scales[token] = scale;
  scales[kGroup + token] = scale * static_cast<float>(vaddlvq_s8(first) + vaddlvq_s8(second));
}

template <typename Arrangement>
void pack(const float* x, int64_t num_tokens, int64_t num_cols, int64_t num_tiles, uint8_t* group) {
  for (int64_t t = 0; t < kGroup; ++t) {
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t left = t < num_tokens ? num_cols - tile * kTileCols : 0;
      const float* source = x + t * num_cols + tile * kTileCols;
      float edge[kTileCols];
      if (left < kTileCols) {
        for (int64_t i = 0; i < kTileCols; ++i) edge[i] = i < left ? source[i] : 0.0f;
        source = edge;
      }
      pack_32<Arrangement>(source, t, group + tile * group_tile_bytes(kGroup));
    }
  }
}

inline void store_f16(const uint16_t* halves, float* out) {
  vst1q_f32(out, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves))));
  vst1q_f32(out + 4, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + 4))));
}

// Nibble tiles: 32 bytes j hold columns 4j .. in the low and 16 + 4j .. in the high halves.
inline void split_nibbles(const uint8_t* source, uint8x16_t quads[8][2]) {
  for (int j = 0; j < 4; ++j) {
    for (int h = 0; h < 2; ++h) {
      const uint8x16_t bytes = vld1q_u8(source + 32 * j + 16 * h);
      quads[j][h] = vandq_u8(bytes, vdupq_n_u8(15));
      quads[j + 4][h] = vshrq_n_u8(bytes, 4);
    }
  }
}

struct UnpackInt4 {
  static void tile(const MatrixView& w, int64_t index, uint8x16_t quads[8][2], float* scale, float* offset) {
    const auto* scales = static_cast<const uint16_t*>(w.scales) + index * 16;
    split_nibbles(static_cast<const uint8_t*>(w.codes) + index * kInt4TileBytes, quads);
    store_f16(scales, scale);
    store_f16(scales + 8, offset);
  }
};

struct UnpackNf4 {
  static void tile(const MatrixView& w, int64_t index, uint8x16_t quads[8][2], float* scale, float* offset) {
    const float* absmax = static_cast<const float*>(w.scales) + index / 2 * 8;
    const uint8x16_t table = veorq_u8(vld1q_u8(kNf4Codebook8.codes), vdupq_n_u8(0x80));  // minus 128
    constexpr float kIntercept = kNf4Codebook8.intercept + 128.0f * kNf4Codebook8.slope;
    split_nibbles(static_cast<const uint8_t*>(w.codes) + index * kInt4TileBytes, quads);
    for (int j = 0; j < 8; ++j) {
      for (int h = 0; h < 2; ++h) quads[j][h] = vqtbl1q_u8(table, quads[j][h]);
    }
    for (int r = 0; r < kTileRows; ++r) {
      scale[r] = absmax[r] * kNf4Codebook8.slope;
      offset[r] = absmax[r] * kIntercept;
    }
  }
};

struct UnpackInt8 {
  static void tile(const MatrixView& w, int64_t index, uint8x16_t quads[8][2], float* scale, float* offset) {
    const uint8_t* source = static_cast<const uint8_t*>(w.codes) + index * kInt8TileBytes;
    for (int j = 0; j < 8; ++j) {
      for (int h = 0; h < 2; ++h) quads[j][h] = vld1q_u8(source + 32 * j + 16 * h);
    }
    store_f16(static_cast<const uint16_t*>(w.scales) + index * 8, scale);
    for (int r = 0; r < kTileRows; ++r) offset[r] = 0.0f;
  }
};

template <typename Unpack, typename Arrangement>
void unpack(const MatrixView& w, int64_t panel, int64_t first_tile, int64_t num_tiles, WeightBlock* weights) {
  WeightTile* tiles = weights->tiles;
  for (int half = 0; half < 2; ++half) {
    const int64_t row_tile = panel * 2 + half;
    const int64_t index = row_tile * tiles_per_row(w) + first_tile;
    for (int64_t t = 0; t < num_tiles; ++t) {
      float *scale = tiles[t].scale + 8 * half, *offset = tiles[t].offset + 8 * half;
      uint8x16_t quads[8][2];
      if (row_tile < num_row_tiles(w)) {
        Unpack::tile(w, index + t, quads, scale, offset);
      } else {
        for (int j = 0; j < 8; ++j) quads[j][0] = quads[j][1] = vdupq_n_u8(0);
        for (int r = 0; r < kTileRows; ++r) scale[r] = offset[r] = 0.0f;
      }
      Arrangement::store_rows(tiles[t].codes, half, quads);
    }
  }
}

// ---- The f32 sums of a group, which live in L1 so that the dots have the registers. ----

using Sums = float[kGroup][kInt8PanelRows];

inline void load_sums(const float* from, int64_t stride, int64_t num_tokens, Sums& sums) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int i = 0; i < kInt8PanelRows; i += 4) vst1q_f32(sums[t] + i, vld1q_f32(from + t * stride + i));
  }
}

inline void store_sums(const Sums& sums, int64_t num_tokens, float* to, int64_t stride) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int i = 0; i < kInt8PanelRows; i += 4) vst1q_f32(to + t * stride + i, vld1q_f32(sums[t] + i));
  }
}

// sums[token][4i ..] += the tile's dots of rows 4i .. 4i + 3.
inline void add_dots(const WeightTile& w, const uint8_t* group, int64_t token, int i, int32x4_t dots, Sums& sums) {
  const auto* scales = reinterpret_cast<const float*>(group + kGroup * kTileCols);
  const float32x4_t scale = vmulq_n_f32(vld1q_f32(w.scale + 4 * i), scales[token]);
  float32x4_t value = vfmaq_n_f32(vld1q_f32(sums[token] + 4 * i), vld1q_f32(w.offset + 4 * i), scales[kGroup + token]);
  vst1q_f32(sums[token] + 4 * i, vfmaq_f32(value, vcvtq_f32_s32(dots), scale));
}

}  // namespace
}  // namespace chainfed

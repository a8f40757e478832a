#include <arm_neon.h>

#include <cstdint>

#include "quant/decode_tiles.h"
#include "quant/nf4_table.h"
#include "quant/tile.h"

namespace chainfed {
namespace {

// ---- Four codes (32-bit integers 0..15, or signed) to four weights ----

struct DecodeInt4 {
  float32x4_t scale, offset;
  float32x4_t operator()(uint32x4_t code) const { return vfmaq_f32(offset, vcvtq_f32_u32(code), scale); }
};

struct DecodeInt8 {
  float32x4_t scale;
  float32x4_t operator()(uint32x4_t code) const { return vmulq_f32(vcvtq_f32_s32(vreinterpretq_s32_u32(code)), scale); }
};

struct DecodeNf4 {
  float32x4_t absmax;
  float32x4_t operator()(uint32x4_t code) const {
    const auto* bytes = reinterpret_cast<const uint8_t*>(kNf4Table);
    const uint8x16x4_t table = {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
    // The four bytes of entry `code`.
    const uint32x4_t places = vmlaq_n_u32(vdupq_n_u32(0x03020100u), code, 0x04040404u);
    return vmulq_f32(vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(places))), absmax);
  }
};

float32x4_t load_f16(const uint16_t* halves) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves))); }
float32x4_t all_of(float value) { return vdupq_n_f32(value); }
float one_f16(const uint16_t* half) {
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vld1_dup_u16(half))), 0);
}

template <BlockFormat Format>
struct Tile;

// lanes(h): rows 4h .. 4h + 3, one a lane; row(r): row r in all lanes.
template <>
struct Tile<BlockFormat::int4> {
  const uint8_t* codes;
  const uint16_t* scales;
  Tile(const MatrixView& w, int64_t index)
      : codes(static_cast<const uint8_t*>(w.codes) + index * kInt4TileBytes),
        scales(static_cast<const uint16_t*>(w.scales) + index * 16) {}
  DecodeInt4 lanes(int h) const { return {load_f16(scales + 4 * h), load_f16(scales + 8 + 4 * h)}; }
  DecodeInt4 row(int r) const { return {all_of(one_f16(scales + r)), all_of(one_f16(scales + 8 + r))}; }
};

template <>
struct Tile<BlockFormat::nf4> {
  const uint8_t* codes;
  const float* scales;
  Tile(const MatrixView& w, int64_t index)
      : codes(static_cast<const uint8_t*>(w.codes) + index * kInt4TileBytes),
        scales(static_cast<const float*>(w.scales) + index / 2 * 8) {}
  DecodeNf4 lanes(int h) const { return {vld1q_f32(scales + 4 * h)}; }
  DecodeNf4 row(int r) const { return {all_of(scales[r])}; }
};

template <>
struct Tile<BlockFormat::int8> {
  const uint8_t* codes;
  const uint16_t* scales;
  Tile(const MatrixView& w, int64_t index)
      : codes(static_cast<const uint8_t*>(w.codes) + index * kInt8TileBytes),
        scales(static_cast<const uint16_t*>(w.scales) + index * 8) {}
  DecodeInt8 lanes(int h) const { return {load_f16(scales + 4 * h)}; }
  DecodeInt8 row(int r) const { return {all_of(one_f16(scales + r))}; }
};

// Four rows of tile vector j: a lane holds four neighbouring columns of one row, a byte each.
uint32x4_t load_codes(const uint8_t* codes, int j, int h) {
  return vreinterpretq_u32_u8(vld1q_u8(codes + 32 * j + 16 * h));
}

// Byte i of each lane, sign-extended.
uint32x4_t signed_byte(uint32x4_t bytes, int i) {
  const int32x4_t left = vshlq_s32(vreinterpretq_s32_u32(bytes), vdupq_n_s32(24 - 8 * i));
  return vreinterpretq_u32_s32(vshrq_n_s32(left, 24));
}

template <BlockFormat Format>
void by_column(const MatrixView& w, int64_t row_tile, int64_t first_tile, int64_t num_tiles, float* out,
               int64_t stride) {
  const uint32x4_t nibble = vdupq_n_u32(15);
  const int64_t index = row_tile * tiles_per_row(w) + first_tile;
  for (int64_t t = 0; t < num_tiles; ++t, out += kTileCols * stride) {
    const Tile<Format> tile(w, index + t);
    for (int h = 0; h < 2; ++h) {
      const auto decode = tile.lanes(h);
      for (int j = 0; j < (Format == BlockFormat::int8 ? 8 : 4); ++j) {
        const uint32x4_t bytes = load_codes(tile.codes, j, h);
        float* column = out + 4 * j * stride + 4 * h;
        for (int i = 0; i < 4; ++i, column += stride) {
          if constexpr (Format == BlockFormat::int8) {
            vst1q_f32(column, decode(signed_byte(bytes, i)));
          } else {
            const uint32x4_t shifted = vshlq_u32(bytes, vdupq_n_s32(-8 * i));
            vst1q_f32(column, decode(vandq_u32(shifted, nibble)));
            vst1q_f32(column + 16 * stride, decode(vandq_u32(vshrq_n_u32(shifted, 4), nibble)));
          }
        }
      }
    }
  }
}

// Four vectors [j][row][4 bytes] of four rows to four rows of 16 bytes.
void gather_rows_of_bytes(const uint8_t* codes, int h, uint8x16_t rows[4]) {
  const uint32x4_t v0 = load_codes(codes, 0, h), v1 = load_codes(codes, 1, h);
  const uint32x4_t v2 = load_codes(codes, 2, h), v3 = load_codes(codes, 3, h);
  const uint32x4_t a = vzip1q_u32(v0, v2), b = vzip2q_u32(v0, v2), c = vzip1q_u32(v1, v3), d = vzip2q_u32(v1, v3);
  rows[0] = vreinterpretq_u8_u32(vzip1q_u32(a, c));
  rows[1] = vreinterpretq_u8_u32(vzip2q_u32(a, c));
  rows[2] = vreinterpretq_u8_u32(vzip1q_u32(b, d));
  rows[3] = vreinterpretq_u8_u32(vzip2q_u32(b, d));
}

template <typename Decode>
void store_16(float* out, uint8x16_t bytes, const Decode& decode) {
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
  vst1q_f32(out, decode(vmovl_u16(vget_low_u16(low))));
  vst1q_f32(out + 4, decode(vmovl_u16(vget_high_u16(low))));
  vst1q_f32(out + 8, decode(vmovl_u16(vget_low_u16(high))));
  vst1q_f32(out + 12, decode(vmovl_u16(vget_high_u16(high))));
}

void store_16_signed(float* out, uint8x16_t bytes, const DecodeInt8& decode) {
  const int8x16_t codes = vreinterpretq_s8_u8(bytes);
  const int16x8_t low = vmovl_s8(vget_low_s8(codes)), high = vmovl_s8(vget_high_s8(codes));
  vst1q_f32(out, decode(vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(low)))));
  vst1q_f32(out + 4, decode(vreinterpretq_u32_s32(vmovl_s16(vget_high_s16(low)))));
  vst1q_f32(out + 8, decode(vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(high)))));
  vst1q_f32(out + 12, decode(vreinterpretq_u32_s32(vmovl_s16(vget_high_s16(high)))));
}

template <BlockFormat Format>
void by_row(const MatrixView& w, int64_t row_tile, int64_t tile_column, float* out, int64_t stride, int64_t half) {
  const Tile<Format> tile(w, row_tile * tiles_per_row(w) + tile_column);
  for (int h = 0; h < 2; ++h) {
    uint8x16_t first[4], second[4];
    gather_rows_of_bytes(tile.codes, h, first);
    if constexpr (Format == BlockFormat::int8) gather_rows_of_bytes(tile.codes + 128, h, second);
    for (int r = 0; r < 4; ++r, out += stride) {
      const auto decode = tile.row(4 * h + r);
      if constexpr (Format == BlockFormat::int8) {
        store_16_signed(out, first[r], decode);
        store_16_signed(out + half, second[r], decode);
      } else {
        store_16(out, vandq_u8(first[r], vdupq_n_u8(15)), decode);
        store_16(out + half, vshrq_n_u8(first[r], 4), decode);
      }
    }
  }
}

// ---- Row-major matrices ----

template <BlockFormat Format>
float32x4_t load_4(const MatrixView& w, int64_t position) {
  if constexpr (Format == BlockFormat::f32) {
    return vld1q_f32(static_cast<const float*>(w.codes) + position);
  } else {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(static_cast<const uint16_t*>(w.codes) + position), 16));
  }
}

void transpose_4x4(float32x4_t v[4]) {
  const float32x4_t a = vzip1q_f32(v[0], v[2]), b = vzip2q_f32(v[0], v[2]);
  const float32x4_t c = vzip1q_f32(v[1], v[3]), d = vzip2q_f32(v[1], v[3]);
  v[0] = vzip1q_f32(a, c);
  v[1] = vzip2q_f32(a, c);
  v[2] = vzip1q_f32(b, d);
  v[3] = vzip2q_f32(b, d);
}

template <BlockFormat Format>
void by_column_row_major(const MatrixView& w, int64_t row_tile, int64_t first_tile, int64_t num_tiles, float* out,
                         int64_t stride) {
  const int64_t row = row_tile * kTileRows;
  if (row + kTileRows > w.num_rows || (first_tile + num_tiles) * kTileCols > w.num_cols) {
    kDecodeTilesScalar[static_cast<int>(Format)].by_column(w, row_tile, first_tile, num_tiles, out, stride);
    return;
  }
  for (int64_t c = 0; c < num_tiles * kTileCols; c += 4) {
    for (int h = 0; h < 2; ++h) {
      float32x4_t v[4];
      for (int r = 0; r < 4; ++r) v[r] = load_4<Format>(w, (row + 4 * h + r) * w.num_cols + first_tile * kTileCols + c);
      transpose_4x4(v);
      for (int i = 0; i < 4; ++i) vst1q_f32(out + (c + i) * stride + 4 * h, v[i]);
    }
  }
}

template <BlockFormat Format>
void by_row_row_major(const MatrixView& w, int64_t row_tile, int64_t tile, float* out, int64_t stride, int64_t half) {
  const int64_t row = row_tile * kTileRows, col = tile * kTileCols;
  if (row + kTileRows > w.num_rows || col + kTileCols > w.num_cols) {
    kDecodeTilesScalar[static_cast<int>(Format)].by_row(w, row_tile, tile, out, stride, half);
    return;
  }
  for (int r = 0; r < kTileRows; ++r, out += stride) {
    const int64_t position = (row + r) * w.num_cols + col;
    for (int c = 0; c < 16; c += 4) {
      vst1q_f32(out + c, load_4<Format>(w, position + c));
      vst1q_f32(out + half + c, load_4<Format>(w, position + 16 + c));
    }
  }
}

}  // namespace

const DecodeTiles kDecodeTilesNeon[5] = {
    {&by_column<BlockFormat::int4>, &by_row<BlockFormat::int4>},
    {&by_column<BlockFormat::nf4>, &by_row<BlockFormat::nf4>},
    {&by_column<BlockFormat::int8>, &by_row<BlockFormat::int8>},
    {&by_column_row_major<BlockFormat::bf16>, &by_row_row_major<BlockFormat::bf16>},
    {&by_column_row_major<BlockFormat::f32>, &by_row_row_major<BlockFormat::f32>},
};

}  // namespace chainfed

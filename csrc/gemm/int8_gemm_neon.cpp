// Every aarch64 CPU: eight 8-bit products an instruction, added up in 16 bits. int4 sums all eight of a row's quads
// there (8 * 15 * 127 = 15240); larger codes are widened after two (2 * 128 * 127 = 32512).
#include "gemm/int8_neon-inl.h"

namespace chainfed {
namespace {

// Sums of products of 16 rows with one token: lanes [row][4 columns], two rows a vector.
struct DotNarrow {
  int16x8_t sum[8];
  void clear() {
    for (int i = 0; i < 8; ++i) sum[i] = vdupq_n_s16(0);
  }
  void add(int i, int8x16_t weights, int8x16_t x, bool) {
    sum[2 * i] = vmlal_s8(sum[2 * i], vget_low_s8(weights), vget_low_s8(x));
    sum[2 * i + 1] = vmlal_high_s8(sum[2 * i + 1], weights, x);
  }
  int32x4_t rows(int i) const { return vpaddq_s32(vpaddlq_s16(sum[2 * i]), vpaddlq_s16(sum[2 * i + 1])); }
};

struct DotWide {
  int32x4_t sum[8];
  int16x8_t pair[8];
  void clear() {
    for (int i = 0; i < 8; ++i) sum[i] = vdupq_n_s32(0);
  }
  void add(int i, int8x16_t weights, int8x16_t x, bool second) {
    if (!second) {
      pair[2 * i] = vmull_s8(vget_low_s8(weights), vget_low_s8(x));
      pair[2 * i + 1] = vmull_high_s8(weights, x);
      return;
    }
    sum[2 * i] = vpadalq_s16(sum[2 * i], vmlal_s8(pair[2 * i], vget_low_s8(weights), vget_low_s8(x)));
    sum[2 * i + 1] = vpadalq_s16(sum[2 * i + 1], vmlal_high_s8(pair[2 * i + 1], weights, x));
  }
  int32x4_t rows(int i) const { return vpaddq_s32(sum[2 * i], sum[2 * i + 1]); }
};

inline int8x16_t broadcast_4(const uint8_t* bytes) {
  int32_t four;
  __builtin_memcpy(&four, bytes, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

template <typename Dot>
void multiply(const WeightBlock& weights, const uint8_t* group, int64_t num_tiles, int64_t num_tokens,
              const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  alignas(16) Sums sums;
  load_sums(from, from_stride, num_tokens, sums);
  for (int64_t tile = 0; tile < num_tiles; ++tile, group += group_tile_bytes(kGroup)) {
    const WeightTile& w = weights.tiles[tile];
    for (int64_t t = 0; t < num_tokens; ++t) {
      Dot dot;
      dot.clear();
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const int8x16_t x = broadcast_4(group + t * kTileCols + j * 4);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          dot.add(i, vreinterpretq_s8_u8(vld1q_u8(w.codes + j * 64 + i * 16)), x, j % 2 == 1);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) add_dots(w, group, t, i, dot.rows(i), sums);
    }
  }
  store_sums(sums, num_tokens, to, to_stride);
}

}  // namespace

const Int8Level kInt8Neon = {kGroup,
                             kInt8PanelRows,
                             {{1, &pack<Quads>, &unpack<UnpackInt4, Quads>, &multiply<DotNarrow>},
                              {1, &pack<Quads>, &unpack<UnpackNf4, Quads>, &multiply<DotWide>},
                              {1, &pack<Quads>, &unpack<UnpackInt8, Quads>, &multiply<DotWide>}}};

}  // namespace chainfed

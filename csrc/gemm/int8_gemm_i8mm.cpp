// Sixteen rows x two pairs of tokens: `smmla` multiplies two rows x eight columns with eight columns x two tokens and
// adds the 2 x 2 result, twice the products of `sdot`. A token without a partner is paired with zeros.
#include "gemm/int8_neon-inl.h"

namespace chainfed {
namespace {

template <int Pairs>
void multiply_pairs(const WeightTile* tiles, const uint8_t* group, int64_t num_tiles, int64_t num_tokens,
                    const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  alignas(16) Sums sums = {};
  load_sums(from, from_stride, num_tokens, sums);
  for (int64_t tile = 0; tile < num_tiles; ++tile, group += group_tile_bytes(kGroup)) {
    __asm__ volatile("" : : "r"(sums) : "memory");  // or the compiler keeps the sums in registers and spills the dots
    const WeightTile& w = tiles[tile];
    int32x4_t dot[Pairs][8];  // lanes: row 2i with either token, row 2i + 1 with either
#pragma GCC unroll 2
    for (int p = 0; p < Pairs; ++p) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) dot[p][i] = vdupq_n_s32(0);
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      int8x16_t x[Pairs];
#pragma GCC unroll 2
      for (int p = 0; p < Pairs; ++p) x[p] = vreinterpretq_s8_u8(vld1q_u8(group + p * 64 + k * 16));
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const int8x16_t weights = vreinterpretq_s8_u8(vld1q_u8(w.codes + k * 128 + i * 16));
#pragma GCC unroll 2
        for (int p = 0; p < Pairs; ++p) dot[p][i] = vmmlaq_s32(dot[p][i], weights, x[p]);
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < Pairs; ++p) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        add_dots(w, group, 2 * p, i, vuzp1q_s32(dot[p][2 * i], dot[p][2 * i + 1]), sums);
        add_dots(w, group, 2 * p + 1, i, vuzp2q_s32(dot[p][2 * i], dot[p][2 * i + 1]), sums);
      }
    }
  }
  store_sums(sums, num_tokens, to, to_stride);
}

void multiply(const WeightBlock& weights, const uint8_t* group, int64_t num_tiles, int64_t num_tokens,
              const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  if (num_tokens > 2) {
    multiply_pairs<2>(weights.tiles, group, num_tiles, num_tokens, from, from_stride, to, to_stride);
  } else {
    multiply_pairs<1>(weights.tiles, group, num_tiles, num_tokens, from, from_stride, to, to_stride);
  }
}

}  // namespace

const Int8Level kInt8I8mm = {kGroup,
                             kInt8PanelRows,
                             {{1, &pack<Octets>, &unpack<UnpackInt4, Octets>, &multiply},
                              {1, &pack<Octets>, &unpack<UnpackNf4, Octets>, &multiply},
                              {1, &pack<Octets>, &unpack<UnpackInt8, Octets>, &multiply}}};

}  // namespace chainfed

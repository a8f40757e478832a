// Sixteen rows x four tokens: `sdot` adds four products to a 32-bit lane, a row a lane, with the token's four bytes
// taken from a lane of its vector. Sixteen sums, four weights and four tokens in registers.
#include "gemm/int8_neon-inl.h"

namespace chainfed {
namespace {

// Columns 4 * Lane .. of a half tile (16 columns) for all tokens.
template <int Lane, int Tokens>
inline void add_quad(const uint8_t* codes, const int8x16_t x[Tokens], int32x4_t dot[Tokens][4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int8x16_t weights = vreinterpretq_s8_u8(vld1q_u8(codes + Lane * 64 + i * 16));
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) dot[t][i] = vdotq_laneq_s32(dot[t][i], weights, x[t], Lane);
  }
}

template <int Tokens>
void multiply_tokens(const WeightTile* tiles, const uint8_t* group, int64_t num_tiles, const float* from,
                     int64_t from_stride, float* to, int64_t to_stride) {
  alignas(16) Sums sums;
  load_sums(from, from_stride, Tokens, sums);
  for (int64_t tile = 0; tile < num_tiles; ++tile, group += group_tile_bytes(kGroup)) {
    __asm__ volatile("" : : "r"(sums) : "memory");  // or the compiler keeps the sums in registers and spills the dots
    const WeightTile& w = tiles[tile];
    int32x4_t dot[Tokens][4];
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) dot[t][0] = dot[t][1] = dot[t][2] = dot[t][3] = vdupq_n_s32(0);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      int8x16_t x[Tokens];
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) x[t] = vreinterpretq_s8_u8(vld1q_u8(group + t * kTileCols + half * 16));
      const uint8_t* codes = w.codes + half * 256;
      add_quad<0, Tokens>(codes, x, dot);
      add_quad<1, Tokens>(codes, x, dot);
      add_quad<2, Tokens>(codes, x, dot);
      add_quad<3, Tokens>(codes, x, dot);
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) add_dots(w, group, t, i, dot[t][i], sums);
    }
  }
  store_sums(sums, Tokens, to, to_stride);
}

using Multiply = void (*)(const WeightTile*, const uint8_t*, int64_t, const float*, int64_t, float*, int64_t);
constexpr Multiply kMultiply[kGroup] = {&multiply_tokens<1>, &multiply_tokens<2>, &multiply_tokens<3>,
                                        &multiply_tokens<4>};

void multiply(const WeightBlock& weights, const uint8_t* group, int64_t num_tiles, int64_t num_tokens,
              const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  kMultiply[num_tokens - 1](weights.tiles, group, num_tiles, from, from_stride, to, to_stride);
}

}  // namespace

const Int8Level kInt8Dotprod = {kGroup,
                                kInt8PanelRows,
                                {{1, &pack<Quads>, &unpack<UnpackInt4, Quads>, &multiply},
                                 {1, &pack<Quads>, &unpack<UnpackNf4, Quads>, &multiply},
                                 {1, &pack<Quads>, &unpack<UnpackInt8, Quads>, &multiply}}};

}  // namespace chainfed

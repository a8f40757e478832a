// 32 rows x up to eight tokens: `vpdpbusd` adds four u8 x s8 products to an int32 lane, with the four activation bytes
// broadcast from memory. The 16 dots of a tile have the registers; f32 sums of a block lie in L1. A dot starts at
// -128 * (sum of the activations), which takes the codes' zero point out. One dot serves all formats.
#include <immintrin.h>

#include <cstdint>

#include "gemm/int8_gemm.h"
#include "gemm/int8_wide-inl.h"

namespace chainfed {
namespace {

constexpr int64_t kGroup = 6;
constexpr int kHalves = kWidePanelRows / 16;

inline __m512i broadcast_4(const uint8_t* bytes) {
  int32_t four;
  __builtin_memcpy(&four, bytes, 4);
  return _mm512_set1_epi32(four);
}

template <int Tokens>
void multiply_tokens(const WideBlock& block, const uint8_t* group, int64_t num_tiles, const float* from,
                     int64_t from_stride, float* to, int64_t to_stride) {
  __m512 sum[Tokens][kHalves];
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
  for (int64_t tile = 0; tile < num_tiles; ++tile, group += group_tile_bytes(kGroup)) {
    const uint8_t* codes = block.codes[tile];
    const uint8_t* scales = group + kGroup * kTileCols;
    const uint8_t* zero_points = scales + kGroup * sizeof(float);
    __m512i dot[Tokens][kHalves];
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) dot[t][0] = dot[t][1] = broadcast_4(zero_points + 4 * t);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m512i first = _mm512_load_si512(codes + j * 128), second = _mm512_load_si512(codes + j * 128 + 64);
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) {
        const __m512i x = broadcast_4(group + t * kTileCols + j * 4);
        dot[t][0] = _mm512_dpbusd_epi32(dot[t][0], first, x);
        dot[t][1] = _mm512_dpbusd_epi32(dot[t][1], second, x);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const __m512 scale = _mm512_castsi512_ps(broadcast_4(scales + 4 * t));
      sum[t][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[t][0]), scale, sum[t][0]);
      sum[t][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[t][1]), scale, sum[t][1]);
    }
  }
#pragma GCC unroll 2
  for (int half = 0; half < kHalves; ++half) {
    const __m512 scale = _mm512_load_ps(block.scale + 16 * half);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const __m512 before = _mm512_loadu_ps(from + t * from_stride + 16 * half);
      _mm512_storeu_ps(to + t * to_stride + 16 * half, _mm512_fmadd_ps(sum[t][half], scale, before));
    }
  }
}

using Multiply = void (*)(const WideBlock&, const uint8_t*, int64_t, const float*, int64_t, float*, int64_t);
constexpr Multiply kMultiply[kGroup] = {&multiply_tokens<1>, &multiply_tokens<2>, &multiply_tokens<3>,
                                        &multiply_tokens<4>, &multiply_tokens<5>, &multiply_tokens<6>};

void multiply(const WeightBlock& weights, const uint8_t* group, int64_t num_tiles, int64_t num_tokens,
              const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  kMultiply[num_tokens - 1](weights.wide, group, num_tiles, from, from_stride, to, to_stride);
}

}  // namespace

const Int8Level kInt8Avx512Vnni = {kGroup,
                                   kWidePanelRows,
                                   {{1, &pack<kGroup, MinusZeroPoint>, &unpack_wide<WideInt4>, &multiply},
                                    {1, &pack<kGroup, MinusZeroPoint>, &unpack_wide<WideNf4>, &multiply},
                                    {1, &pack<kGroup, MinusZeroPoint>, &unpack_wide<WideInt8>, &multiply}}};

}  // namespace chainfed

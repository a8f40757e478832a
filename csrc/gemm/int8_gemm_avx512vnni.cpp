// Sixteen rows x up to eight tokens in registers: `vpdpbusd` adds four u8 x s8 products to an int32 lane, with the four
// activation bytes broadcast from memory. One dot serves all formats; int8 weights are stored as code + 128.
#include <immintrin.h>

#include <cstdint>

#include "gemm/int8_gemm.h"
#include "gemm/int8_unpack-inl.h"

namespace chainfed {
namespace {

constexpr int64_t kGroup = 8;

inline __m512i broadcast_4(const uint8_t* bytes) {
  int32_t four;
  __builtin_memcpy(&four, bytes, 4);
  return _mm512_set1_epi32(four);
}

template <int Tokens>
void multiply_tokens(const WeightTile* tiles, const uint8_t* group, int64_t num_tiles, const float* start, float* out,
                     int64_t row_stride) {
  __m512 sum[Tokens];
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) sum[t] = _mm512_loadu_ps(start != nullptr ? start : out + t * row_stride);
  for (int64_t tile = 0; tile < num_tiles; ++tile, group += group_tile_bytes(kGroup)) {
    const WeightTile& w = tiles[tile];
    __m512i dot[Tokens];
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) dot[t] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m512i weights = _mm512_load_si512(w.codes + j * 64);
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) {
        dot[t] = _mm512_dpbusd_epi32(dot[t], weights, broadcast_4(group + t * kTileCols + j * 4));
      }
    }
    const auto* scales = reinterpret_cast<const float*>(group + kGroup * kTileCols);
    const __m512 w_scale = _mm512_load_ps(w.scale), w_offset = _mm512_load_ps(w.offset);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const __m512 scale = _mm512_mul_ps(w_scale, _mm512_set1_ps(scales[t]));
      sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[t]), scale, sum[t]);
      sum[t] = _mm512_fmadd_ps(w_offset, _mm512_set1_ps(scales[kGroup + t]), sum[t]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) _mm512_storeu_ps(out + t * row_stride, sum[t]);
}

using Multiply = void (*)(const WeightTile*, const uint8_t*, int64_t, const float*, float*, int64_t);
constexpr Multiply kMultiply[kGroup] = {&multiply_tokens<1>, &multiply_tokens<2>, &multiply_tokens<3>,
                                        &multiply_tokens<4>, &multiply_tokens<5>, &multiply_tokens<6>,
                                        &multiply_tokens<7>, &multiply_tokens<8>};

void multiply(const WeightTile* tiles, const uint8_t* group, int64_t num_tiles, int64_t num_tokens, const float* start,
              float* out, int64_t row_stride) {
  kMultiply[num_tokens - 1](tiles, group, num_tiles, start, out, row_stride);
}

}  // namespace

const Int8Level kInt8Avx512Vnni = {kGroup,
                                   &pack<kGroup>,
                                   {{&unpack<UnpackInt4>, &multiply},
                                    {&unpack<UnpackNf4<kNf4Codebook8>>, &multiply},
                                    {&unpack<UnpackInt8>, &multiply}}};

}  // namespace chainfed

// Two row tiles x up to four tokens in registers. Four activation bytes are broadcast against 8 rows x 4 inputs, so no
// sum runs across lanes. Three dots:
//   int4  codes <= 15: eight `maddubs` (u8 x s8 pairs, int16) add up to at most 8 * 2 * 15 * 127 = 30480 and are
//         widened once a tile;
//   nf4   codes <= 127: a pair is at most 2 * 127 * 127 = 32258, so each `maddubs` is widened at once;
//   int8  codes and activations widened to 16 bits, `madd` of two inputs at a time: no product can saturate.
#include <immintrin.h>

#include <cstdint>

#include "gemm/int8_gemm.h"
#include "gemm/int8_unpack-inl.h"

namespace chainfed {
namespace {

constexpr int64_t kGroup = 4;

inline __m256i broadcast_4(const uint8_t* bytes) {
  int32_t four;
  __builtin_memcpy(&four, bytes, 4);
  return _mm256_set1_epi32(four);
}

// The compiler must add each product when it is made: left alone, it makes all 64 first and spills them.
inline void keep_in_register(__m256i& value) { __asm__("" : "+x"(value)); }

struct DotNarrow {
  __m256i sum;
  void clear(__m256i weights, __m256i x) { sum = _mm256_maddubs_epi16(weights, x); }
  void add(__m256i weights, __m256i x) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, x));
    keep_in_register(sum);
  }
  __m256i total() const { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
};

struct DotWide {
  __m256i sum;
  static __m256i product(__m256i weights, __m256i x) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(weights, x), _mm256_set1_epi16(1));
  }
  void clear(__m256i weights, __m256i x) { sum = product(weights, x); }
  void add(__m256i weights, __m256i x) {
    sum = _mm256_add_epi32(sum, product(weights, x));
    keep_in_register(sum);
  }
  __m256i total() const { return sum; }
};

template <int Tokens>
inline void load_sums(const float* from, int64_t stride, float sums[][kInt8PanelRows]) {
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
    _mm256_store_ps(sums[t], _mm256_loadu_ps(from + t * stride));
    _mm256_store_ps(sums[t] + 8, _mm256_loadu_ps(from + t * stride + 8));
  }
}

template <int Tokens>
inline void store_sums(const float sums[][kInt8PanelRows], float* to, int64_t stride) {
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
    _mm256_storeu_ps(to + t * stride, _mm256_load_ps(sums[t]));
    _mm256_storeu_ps(to + t * stride + 8, _mm256_load_ps(sums[t] + 8));
  }
}

// sums[row] += the tile's dots of one token: rows 0..7 and 8..15.
inline void add_dots(const WeightTile& w, const uint8_t* group, int t, __m256i first, __m256i second, float* sums) {
  const auto* scales = reinterpret_cast<const float*>(group + kGroup * kTileCols);
  const __m256 x_scale = _mm256_broadcast_ss(scales + t), x_sum = _mm256_broadcast_ss(scales + kGroup + t);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    float* sum = sums + 8 * half;
    const __m256 scale = _mm256_mul_ps(_mm256_load_ps(w.scale + 8 * half), x_scale);
    __m256 value = _mm256_fmadd_ps(_mm256_load_ps(w.offset + 8 * half), x_sum, _mm256_load_ps(sum));
    value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(half == 0 ? first : second), scale, value);
    _mm256_store_ps(sum, value);
  }
}

template <typename Dot, int Tokens>
void multiply_tokens(const WeightTile* tiles, const uint8_t* group, int64_t num_tiles, const float* from,
                     int64_t from_stride, float* to, int64_t to_stride) {
  // The eight dots, two weights, one broadcast and one product need the registers; the f32 sums live in L1. The empty
  // asm says that somebody may look at them, or the compiler keeps them in registers and spills the dots instead.
  alignas(32) float sums[Tokens][kInt8PanelRows];
  load_sums<Tokens>(from, from_stride, sums);
  for (int64_t tile = 0; tile < num_tiles; ++tile, group += group_tile_bytes(kGroup)) {
    __asm__ volatile("" : : "r"(sums) : "memory");
    const WeightTile& w = tiles[tile];
    Dot dot[Tokens][2];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m256i w0 = load_bytes(w.codes + j * 64), w1 = load_bytes(w.codes + j * 64 + 32);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        const __m256i x = broadcast_4(group + t * kTileCols + j * 4);
        if (j == 0) {
          dot[t][0].clear(w0, x);
          dot[t][1].clear(w1, x);
        } else {
          dot[t][0].add(w0, x);
          dot[t][1].add(w1, x);
        }
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) add_dots(w, group, t, dot[t][0].total(), dot[t][1].total(), sums[t]);
  }
  __asm__ volatile("" : : "r"(sums) : "memory");
  store_sums<Tokens>(sums, to, to_stride);
}

// ---- int8: 16-bit products of column pairs, codes [pair][row][2] ----

struct UnpackPairs {
  static constexpr BlockFormat kFormat = BlockFormat::int8;
  static void tile(const MatrixView& w, int64_t index, uint8_t* codes, float* scale, float* offset) {
    const uint8_t* source = static_cast<const uint8_t*>(w.codes) + index * kInt8TileBytes;
    // Bytes 0 and 1 (2 and 3) of each row to the upper halves of 16-bit lanes, from where they are shifted down.
    const __m256i first = _mm256_set1_epi64x(0x0580048001800080), second = _mm256_set1_epi64x(0x0780068003800280);
    const __m256i upper_rows = _mm256_setr_epi64x(0, 0x0800080008000800, 0, 0x0800080008000800);
    for (int j = 0; j < 8; ++j) {
      const __m256i bytes = load_bytes(source + 32 * j);
      const __m256i low = _mm256_shuffle_epi8(bytes, _mm256_add_epi8(first, upper_rows));
      const __m256i high = _mm256_shuffle_epi8(bytes, _mm256_add_epi8(second, upper_rows));
      store_bytes(codes + 2 * j * 64, _mm256_srai_epi16(low, 8));
      store_bytes(codes + (2 * j + 1) * 64, _mm256_srai_epi16(high, 8));
    }
    _mm256_storeu_ps(scale, load_f16(static_cast<const uint16_t*>(w.scales) + index * 8));
    _mm256_storeu_ps(offset, _mm256_setzero_ps());
  }
};

// In assembly: the compiler's own schedule copies every sum once a step.
inline void multiply_add(__m256i& sum, __m256i weights, __m256i x) {
  __m256i product;
  __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(weights), "x"(x));
}

template <int Tokens>
void multiply_pairs(const WeightTile* tiles, const uint8_t* group, int64_t num_tiles, const float* from,
                    int64_t from_stride, float* to, int64_t to_stride) {
  alignas(32) float sums[Tokens][kInt8PanelRows];
  load_sums<Tokens>(from, from_stride, sums);
  // All of them first: a broadcast of what has just been stored waits.
  alignas(32) int16_t wide[kInt8BlockTiles][Tokens][kTileCols];
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    for (int t = 0; t < Tokens; ++t) {
      const __m256i codes = load_bytes(group + tile * group_tile_bytes(kGroup) + t * kTileCols);
      auto* target = reinterpret_cast<__m256i*>(wide[tile][t]);
      _mm256_store_si256(target, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(codes)));
      _mm256_store_si256(target + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(codes, 1)));
    }
  }
  for (int64_t tile = 0; tile < num_tiles; ++tile, group += group_tile_bytes(kGroup)) {
    __asm__ volatile("" : : "r"(sums) : "memory");
    const auto& x = wide[tile];
    const WeightTile& w = tiles[tile];
    __m256i dot[Tokens][2];
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) dot[t][0] = dot[t][1] = _mm256_setzero_si256();
#pragma GCC unroll 16
    for (int pair = 0; pair < kTileCols / 2; ++pair) {
      const __m256i w0 = load_bytes(w.codes + pair * 64), w1 = load_bytes(w.codes + pair * 64 + 32);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        const __m256i both = broadcast_4(reinterpret_cast<const uint8_t*>(x[t] + 2 * pair));
        multiply_add(dot[t][0], w0, both);
        multiply_add(dot[t][1], w1, both);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) add_dots(w, group, t, dot[t][0], dot[t][1], sums[t]);
  }
  __asm__ volatile("" : : "r"(sums) : "memory");
  store_sums<Tokens>(sums, to, to_stride);
}

using Multiply = void (*)(const WeightTile*, const uint8_t*, int64_t, const float*, int64_t, float*, int64_t);
template <typename Dot>
constexpr Multiply kMultiply[kGroup] = {&multiply_tokens<Dot, 1>, &multiply_tokens<Dot, 2>, &multiply_tokens<Dot, 3>,
                                        &multiply_tokens<Dot, 4>};
constexpr Multiply kMultiplyPairs[kGroup] = {&multiply_pairs<1>, &multiply_pairs<2>, &multiply_pairs<3>,
                                             &multiply_pairs<4>};

template <const Multiply* Functions>
void multiply(const WeightBlock& weights, const uint8_t* group, int64_t num_tiles, int64_t num_tokens,
              const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Functions[num_tokens - 1](weights.tiles, group, num_tiles, from, from_stride, to, to_stride);
}

}  // namespace

const Int8Level kInt8Avx2 = {kGroup,
                             kInt8PanelRows,
                             &pack<kGroup, ScaledSums>,
                             {{&unpack<UnpackInt4>, &multiply<kMultiply<DotNarrow>>},
                              {&unpack<UnpackNf4<kNf4Codebook7>>, &multiply<kMultiply<DotWide>>},
                              {&unpack<UnpackPairs>, &multiply<kMultiplyPairs>}}};

}  // namespace chainfed

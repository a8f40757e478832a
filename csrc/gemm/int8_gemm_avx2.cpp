// Two row tiles x up to four tokens in registers. Four activation bytes are broadcast against 8 rows x 4 inputs, so no
// sum runs across lanes. Three dots:
//   int4  codes <= 15: eight `maddubs` (u8 x s8 pairs, int16) add up to at most 8 * 2 * 15 * 127 = 30480; one `madd` a
//         tile widens them and multiplies with the tile's factor;
//   nf4   codes <= 127: a pair is at most 2 * 127 * 127 = 32258, so each `maddubs` is followed by that `madd`;
//   int8  codes and activations widened to 16 bits, `madd` of two inputs at a time: no product can saturate.
#include <immintrin.h>

#include <cstdint>

#include "base/step_avx2-inl.h"
#include "gemm/int8_factor-inl.h"
#include "gemm/int8_gemm.h"
#include "gemm/int8_pack-inl.h"

namespace chainfed {
namespace {

constexpr int64_t kGroup = 4;

// The tile's factors of rows 0..7 and 8..15.
struct Factors {
  __m256i rows[2];
};

inline __m256i broadcast_4(const uint8_t* bytes) { return _mm256_set1_epi32(four_bytes(bytes)); }
// For fewer tokens than a step in assembly has: the compiler must add each product when it is made.
inline void keep_in_register(__m256i& value) { __asm__("" : "+x"(value)); }

#define CHAINFED_BYTES(w, product, half) "vpmaddubsw %[x], " w ", " product "\n\t"
#define CHAINFED_SCALED_BYTES(w, product, half) \
  CHAINFED_BYTES(w, product, half) "vpmaddwd %[f" half "], " product ", " product "\n\t"

struct DotInt4 {
  static __m256i product(__m256i w, __m256i x, __m256i) { return _mm256_maddubs_epi16(w, x); }
  static __m256i plus(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
  static __m256i total(__m256i sum, __m256i factor) { return _mm256_madd_epi16(sum, factor); }
  static void step(__m256i (&sum)[kStepTokens][2], __m256i w0, __m256i w1, const Factors&, const uint8_t* bytes) {
    __m256i x, product;
    __asm__(CHAINFED_STEP(CHAINFED_BYTES, "vpaddw")
            : CHAINFED_SUMS(sum), [x] "=&x"(x), [product] "=&x"(product)
            : [w0] "x"(w0), [w1] "x"(w1), CHAINFED_FOURS(bytes, kTileCols));
  }
};

struct DotNf4 {
  static __m256i product(__m256i w, __m256i x, __m256i factor) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), factor);
  }
  static __m256i plus(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
  static __m256i total(__m256i sum, __m256i) { return sum; }
  static void step(__m256i (&sum)[kStepTokens][2], __m256i w0, __m256i w1, const Factors& factors,
                   const uint8_t* bytes) {
    __m256i x, product;
    __asm__(CHAINFED_STEP(CHAINFED_SCALED_BYTES, "vpaddd")
            : CHAINFED_SUMS(sum), [x] "=&x"(x), [product] "=&x"(product)
            : [w0] "x"(w0), [w1] "x"(w1), [f0] "x"(factors.rows[0]), [f1] "x"(factors.rows[1]),
              CHAINFED_FOURS(bytes, kTileCols));
  }
};

template <typename Dot, int Tokens>
void multiply_factors(const WeightBlock& weights, const uint8_t* group, int64_t num_tiles, const float* from,
                      int64_t from_stride, float* to, int64_t to_stride) {
  const FactorBlock& block = weights.factors;
  // In units of the rows' scales. Eight dots, two weights, a broadcast and a product need the registers: these sums
  // live in L1.
  alignas(32) float sums[Tokens][kInt8PanelRows] = {};
  for (int64_t i = 0; i < num_tiles; ++i) {
    // Somebody may look at the sums, or the compiler keeps them in registers and spills the dots instead.
    __asm__ volatile("" : : "r"(sums) : "memory");
    const FactorTile& w = block.tiles[i];
    const uint8_t* x = group + i * group_tile_bytes(kGroup);
    const Factors factors = {{load_aligned(w.factor), load_aligned(w.factor + 8)}};
    __m256i dot[Tokens][2];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m256i w0 = load_aligned(w.codes + j * 64), w1 = load_aligned(w.codes + j * 64 + 32);
      if constexpr (Tokens == kStepTokens) {
        if (j > 0) {
          Dot::step(dot, w0, w1, factors, x + 4 * j);
          continue;
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        const __m256i four = broadcast_4(x + t * kTileCols + 4 * j);
        const __m256i products[2] = {Dot::product(w0, four, factors.rows[0]), Dot::product(w1, four, factors.rows[1])};
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          dot[t][half] = j == 0 ? products[half] : Dot::plus(dot[t][half], products[half]);
          keep_in_register(dot[t][half]);
        }
      }
    }
    const auto* x_scales = reinterpret_cast<const float*>(x + kGroup * kTileCols);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      const __m256 x_scale = _mm256_broadcast_ss(x_scales + t);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* sum = sums[t] + 8 * half;
        const __m256 total = _mm256_cvtepi32_ps(Dot::total(dot[t][half], factors.rows[half]));
        _mm256_store_ps(sum, _mm256_fmadd_ps(total, x_scale, _mm256_load_ps(sum)));
      }
    }
  }
  __asm__ volatile("" : : "r"(sums) : "memory");
  // The offsets, a product of their own: its sums stay in registers.
  __m256 out[Tokens][2];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
    out[t][0] = _mm256_loadu_ps(from + t * from_stride);
    out[t][1] = _mm256_loadu_ps(from + t * from_stride + 8);
  }
  const auto* x_sums = reinterpret_cast<const float*>(group + kGroup * (kTileCols + sizeof(float)));
#pragma GCC unroll 4
  for (int64_t i = 0; i < num_tiles; ++i, x_sums += group_tile_bytes(kGroup) / sizeof(float)) {
    const __m256 offset0 = _mm256_load_ps(block.tiles[i].offset), offset1 = _mm256_load_ps(block.tiles[i].offset + 8);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      const __m256 x_sum = _mm256_broadcast_ss(x_sums + t);
      out[t][0] = _mm256_fmadd_ps(offset0, x_sum, out[t][0]);
      out[t][1] = _mm256_fmadd_ps(offset1, x_sum, out[t][1]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256 scale = _mm256_load_ps(block.scale + 8 * half), sum = _mm256_load_ps(sums[t] + 8 * half);
      _mm256_storeu_ps(to + t * to_stride + 8 * half, _mm256_fmadd_ps(scale, sum, out[t][half]));
    }
  }
}

// ---- int8: 16-bit products of column pairs, codes [pair][row][2] ----

void unpack_pairs_tile(const MatrixView& w, int64_t index, uint8_t* codes, float* scale) {
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
  _mm256_store_ps(scale, load_f16(static_cast<const uint16_t*>(w.scales) + index * 8));
}

void unpack_pairs(const MatrixView& w, int64_t panel, int64_t first_tile, int64_t num_tiles, WeightBlock* weights) {
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t row_tile = panel * 2 + half;
    const int64_t index = row_tile * tiles_per_row(w) + first_tile;
    for (int64_t t = 0; t < num_tiles; ++t) {
      WeightTile& tile = weights->tiles[t];
      uint8_t* codes = tile.codes + 32 * half;
      if (row_tile < num_row_tiles(w)) {
        unpack_pairs_tile(w, index + t, codes, tile.scale + 8 * half);
        continue;
      }
      for (int pair = 0; pair < kTileCols / 2; ++pair) store_bytes(codes + 64 * pair, _mm256_setzero_si256());
      _mm256_store_ps(tile.scale + 8 * half, _mm256_setzero_ps());
    }
  }
}

template <int Tokens>
void multiply_pairs(const WeightBlock& weights, const uint8_t* group, int64_t num_tiles, const float* from,
                    int64_t from_stride, float* to, int64_t to_stride) {
  alignas(32) float sums[Tokens][kInt8PanelRows];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
    _mm256_store_ps(sums[t], _mm256_loadu_ps(from + t * from_stride));
    _mm256_store_ps(sums[t] + 8, _mm256_loadu_ps(from + t * from_stride + 8));
  }
  for (int64_t tile = 0; tile < num_tiles; ++tile, group += group_tile_bytes(kGroup, 2)) {
    __asm__ volatile("" : : "r"(sums) : "memory");
    const WeightTile& w = weights.tiles[tile];
    __m256i dot[Tokens][2];
#pragma GCC unroll 16
    for (int pair = 0; pair < kTileCols / 2; ++pair) {
      const __m256i w0 = load_aligned(w.codes + pair * 64), w1 = load_aligned(w.codes + pair * 64 + 32);
      if constexpr (Tokens == kStepTokens) {
        if (pair > 0) {
          step_pairs(dot, w0, w1, group + 4 * pair, 2 * kTileCols);
          continue;
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        const __m256i both = broadcast_4(group + 2 * t * kTileCols + 4 * pair);
        const __m256i products[2] = {_mm256_madd_epi16(w0, both), _mm256_madd_epi16(w1, both)};
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          dot[t][half] = pair == 0 ? products[half] : _mm256_add_epi32(dot[t][half], products[half]);
          keep_in_register(dot[t][half]);
        }
      }
    }
    const auto* x_scales = reinterpret_cast<const float*>(group + 2 * kGroup * kTileCols);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      const __m256 x_scale = _mm256_broadcast_ss(x_scales + t);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* sum = sums[t] + 8 * half;
        const __m256 scale = _mm256_mul_ps(_mm256_load_ps(w.scale + 8 * half), x_scale);
        _mm256_store_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[t][half]), scale, _mm256_load_ps(sum)));
      }
    }
  }
  __asm__ volatile("" : : "r"(sums) : "memory");
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
    _mm256_storeu_ps(to + t * to_stride, _mm256_load_ps(sums[t]));
    _mm256_storeu_ps(to + t * to_stride + 8, _mm256_load_ps(sums[t] + 8));
  }
}

using Multiply = void (*)(const WeightBlock&, const uint8_t*, int64_t, const float*, int64_t, float*, int64_t);
template <typename Dot>
constexpr Multiply kMultiplyFactors[kGroup] = {&multiply_factors<Dot, 1>, &multiply_factors<Dot, 2>,
                                               &multiply_factors<Dot, 3>, &multiply_factors<Dot, 4>};
constexpr Multiply kMultiplyPairs[kGroup] = {&multiply_pairs<1>, &multiply_pairs<2>, &multiply_pairs<3>,
                                             &multiply_pairs<4>};

template <const Multiply* Functions>
void multiply(const WeightBlock& weights, const uint8_t* group, int64_t num_tiles, int64_t num_tokens,
              const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Functions[num_tokens - 1](weights, group, num_tiles, from, from_stride, to, to_stride);
}

}  // namespace

const Int8Level kInt8Avx2 = {
    kGroup,
    kInt8PanelRows,
    {{1, &pack<kGroup, ScaledSums>, &unpack_factors<UnpackInt4>, &multiply<kMultiplyFactors<DotInt4>>},
     {1, &pack<kGroup, ScaledSums>, &unpack_factors<UnpackNf4>, &multiply<kMultiplyFactors<DotNf4>>},
     {2, &pack<kGroup, ScaledSums, 2>, &unpack_pairs, &multiply<kMultiplyPairs>}}};

}  // namespace chainfed

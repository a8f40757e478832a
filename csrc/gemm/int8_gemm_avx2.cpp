// Two row tiles x up to four tokens in registers. Four activation bytes are broadcast against 8 rows x 4 inputs, so no
// sum runs across lanes. Three dots:
//   int4  codes <= 15: eight `maddubs` (u8 x s8 pairs, int16) add up to at most 8 * 2 * 15 * 127 = 30480 and are
//   widened
//         once a tile;
//   nf4   codes <= 127: a pair is at most 2 * 127 * 127 = 32258, so each `maddubs` is widened at once;
//   int8  signed: |w| times sign(x, w), widened at once. |w| = 128 is safe: 2 * 128 * 127 = 32512.
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

struct DotSigned {
  __m256i sum;
  static __m256i product(__m256i weights, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  void clear(__m256i weights, __m256i x) { sum = product(weights, x); }
  void add(__m256i weights, __m256i x) {
    sum = _mm256_add_epi32(sum, product(weights, x));
    keep_in_register(sum);
  }
  __m256i total() const { return sum; }
};

template <typename Dot, int Tokens>
void multiply_tokens(const WeightTile* tiles, const uint8_t* group, int64_t num_tiles, const float* start, float* out,
                     int64_t row_stride) {
  // The eight dots, two weights, one broadcast and one product need the registers; the f32 sums live in L1. The empty
  // asm says that somebody may look at them, or the compiler keeps them in registers and spills the dots instead.
  alignas(32) float sums[Tokens][kInt8PanelRows];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
    const float* base = start != nullptr ? start : out + t * row_stride;
    _mm256_store_ps(sums[t], _mm256_loadu_ps(base));
    _mm256_store_ps(sums[t] + 8, _mm256_loadu_ps(base + 8));
  }
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
    const auto* scales = reinterpret_cast<const float*>(group + kGroup * kTileCols);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      const __m256 x_scale = _mm256_broadcast_ss(scales + t), x_sum = _mm256_broadcast_ss(scales + kGroup + t);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* sum = sums[t] + 8 * half;
        const __m256 scale = _mm256_mul_ps(_mm256_load_ps(w.scale + 8 * half), x_scale);
        __m256 value = _mm256_fmadd_ps(_mm256_load_ps(w.offset + 8 * half), x_sum, _mm256_load_ps(sum));
        value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[t][half].total()), scale, value);
        _mm256_store_ps(sum, value);
      }
    }
  }
  __asm__ volatile("" : : "r"(sums) : "memory");
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
    _mm256_storeu_ps(out + t * row_stride, _mm256_load_ps(sums[t]));
    _mm256_storeu_ps(out + t * row_stride + 8, _mm256_load_ps(sums[t] + 8));
  }
}

template <typename Dot>
void multiply(const WeightTile* tiles, const uint8_t* group, int64_t num_tiles, int64_t num_tokens, const float* start,
              float* out, int64_t row_stride) {
  switch (num_tokens) {
    case 1:
      return multiply_tokens<Dot, 1>(tiles, group, num_tiles, start, out, row_stride);
    case 2:
      return multiply_tokens<Dot, 2>(tiles, group, num_tiles, start, out, row_stride);
    case 3:
      return multiply_tokens<Dot, 3>(tiles, group, num_tiles, start, out, row_stride);
    default:
      return multiply_tokens<Dot, 4>(tiles, group, num_tiles, start, out, row_stride);
  }
}

}  // namespace

const Int8Level kInt8Avx2 = {kGroup,
                             &pack<kGroup>,
                             {{&unpack<UnpackInt4>, &multiply<DotNarrow>},
                              {&unpack<UnpackNf4<kNf4Codebook7>>, &multiply<DotWide>},
                              {&unpack<UnpackInt8<false>>, &multiply<DotSigned>}}};

}  // namespace chainfed

// Unpacking to a WideBlock: codes of 32 rows and up to 512 inputs brought to one scale a row,
//   weight = d u + m  (d, m of a tile's row, u its unsigned code)  =  scale (c - 128),   scale = largest |weight| /
//   127,
// so that a product needs one multiply-add a tile where scales and offsets of tiles would take three. Rounding to c
// moves a weight by at most half a scale, a quarter of the error that 8-bit activations have.
//
// c = (u d / scale + m / scale + 128), in 16-bit fixed point: u in the upper byte times the slope (`mulhi`), plus the
// intercept. A negative d runs through the codes backwards. A row with a NaN or Inf among its scales is NaN.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "gemm/int8_gemm.h"
#include "gemm/int8_pack-inl.h"
#include "gemm/nf4_codebook.h"
#include "quant/tile.h"

namespace chainfed {
namespace {

constexpr float kSmallestScale = 1e-36f;  // below, the row counts as zero

inline __m512 join(__m256 low, __m256 high) { return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1); }
inline __m512i join(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }

// What the 32 inputs of one row tile are: d and m of eight rows, and bytes of u [row][4] for columns 4j ... .
// kFraction: bits behind the point of the fixed-point numbers, as many as the largest u d / scale leaves.
struct WideInt4 {
  static constexpr int kLargest = 15, kFraction = 3, kLoads = 4;
  static constexpr int64_t kBytes = kInt4TileBytes;
  static void affine(const MatrixView& w, int64_t index, __m256* d, __m256* m) {
    const auto* scales = static_cast<const uint16_t*>(w.scales) + index * 16;
    *d = load_f16(scales);
    *m = load_f16(scales + 8);
  }
  // The scale that a row needs for one tile; d >= 0.
  static __m512 scale(__m512 d, __m512 m) {
    const __m512 top = _mm512_fmadd_ps(d, _mm512_set1_ps(kLargest), m);
    return _mm512_mul_ps(_mm512_max_ps(_mm512_abs_ps(m), _mm512_abs_ps(top)), _mm512_set1_ps(1.0f / 127.0f));
  }
  // Bytes 32 * load .. of two row tiles to the codes of columns 4 * load ..; half 1: of columns 16 + 4 * load.
  static __m512i codes(__m512i bytes, int half) {
    return _mm512_and_si512(half == 0 ? bytes : _mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
  }
};

struct WideNf4 {
  static constexpr int kLargest = 255, kFraction = 7, kLoads = 4;
  static constexpr int64_t kBytes = kInt4TileBytes;
  static void affine(const MatrixView& w, int64_t index, __m256* d, __m256* m) {
    const __m256 absmax = _mm256_loadu_ps(static_cast<const float*>(w.scales) + index / 2 * 8);
    *d = _mm256_mul_ps(absmax, _mm256_set1_ps(kNf4Codebook8.slope));
    *m = _mm256_mul_ps(absmax, _mm256_set1_ps(kNf4Codebook8.intercept));
  }
  static __m512 scale(__m512 d, __m512 m) { return WideInt4::scale(_mm512_mul_ps(d, _mm512_set1_ps(17.0f)), m); }
  static __m512i codes(__m512i bytes, int half) {
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kNf4Codebook8.codes)));
    return _mm512_shuffle_epi8(table, WideInt4::codes(bytes, half));
  }
};

struct WideInt8 {
  static constexpr int kLargest = 255, kFraction = 7, kLoads = 8;
  static constexpr int64_t kBytes = kInt8TileBytes;
  static void affine(const MatrixView& w, int64_t index, __m256* d, __m256* m) {
    *d = load_f16(static_cast<const uint16_t*>(w.scales) + index * 8);
    *m = _mm256_mul_ps(*d, _mm256_set1_ps(-128.0f));
  }
  // The largest d: the tile that has it keeps its codes. Backwards, -128 becomes 128 and needs one more.
  static __m512 scale(__m512 d, __m512 m) {
    const __mmask16 backwards = _mm512_cmp_ps_mask(m, _mm512_mul_ps(d, _mm512_set1_ps(-127.5f)), _CMP_GT_OQ);
    return _mm512_mask_mul_ps(d, backwards, d, _mm512_set1_ps(128.0f / 127.0f));
  }
  static __m512i codes(__m512i bytes, int) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }
};

// d and m of 16 rows with d >= 0, and what u is XORed with for that.
struct Affine {
  __m512 d, m;
  __m512i flip;
};

template <typename Format>
Affine affine_of_16(const MatrixView& w, int64_t low_index, int64_t high_index) {
  __m256 d[2], m[2];
  Format::affine(w, low_index, &d[0], &m[0]);
  Format::affine(w, high_index, &d[1], &m[1]);
  const __m512 slope = join(d[0], d[1]), intercept = join(m[0], m[1]);
  const __mmask16 negative = _mm512_cmp_ps_mask(slope, _mm512_setzero_ps(), _CMP_LT_OQ);
  return {_mm512_abs_ps(slope), _mm512_mask3_fmadd_ps(slope, _mm512_set1_ps(Format::kLargest), intercept, negative),
          _mm512_maskz_set1_epi32(negative, static_cast<int>(Format::kLargest * 0x01010101u))};
}

// A number of 16 bits behind another of the same value.
inline __m512i twice(__m512i words) { return _mm512_or_si512(words, _mm512_slli_epi32(words, 16)); }

// Two row tiles to rows 16 * half .. of the block.
template <typename Format>
void unpack_16_rows(const MatrixView& w, int64_t row_tile, int64_t first_tile, int64_t num_tiles, int64_t half,
                    WideBlock* block) {
  const int64_t per_row = tiles_per_row(w), last = num_row_tiles(w) - 1;
  const bool alone = row_tile == last;  // then its rows stand in for those that do not exist
  const int64_t low = row_tile * per_row + first_tile, high = alone ? low : low + per_row;
  __m512 largest = _mm512_setzero_ps(), poison = _mm512_setzero_ps();
  for (int64_t t = 0; t < num_tiles; ++t) {
    const Affine row = affine_of_16<Format>(w, low + t, high + t);
    const __m512 scale = Format::scale(row.d, row.m);
    poison = _mm512_fmadd_ps(scale, _mm512_setzero_ps(), poison);
    largest = _mm512_max_ps(largest, scale);
  }
  const __mmask16 usable = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(kSmallestScale), _CMP_GE_OQ);
  const __m512 inverse = _mm512_maskz_div_ps(usable, _mm512_set1_ps(1.0f), largest);
  _mm512_store_ps(block->scale + 16 * half, _mm512_add_ps(_mm512_maskz_mov_ps(usable, largest), poison));
  constexpr float kOne = 1 << Format::kFraction;
  constexpr int kNibbleHalves = 8 / Format::kLoads;
  for (int64_t t = 0; t < num_tiles; ++t) {
    const Affine row = affine_of_16<Format>(w, low + t, high + t);
    const __m512 slope = _mm512_mul_ps(_mm512_mul_ps(row.d, inverse), _mm512_set1_ps(256.0f * kOne));
    // Half for rounding, and half of the last bit that `mulhi` cuts off on average.
    const __m512 intercept =
        _mm512_fmadd_ps(_mm512_mul_ps(row.m, inverse), _mm512_set1_ps(kOne), _mm512_set1_ps(128.5f * kOne + 0.5f));
    const __m512i slopes = twice(_mm512_cvtps_epi32(slope));
    const __m512i intercepts = twice(_mm512_and_si512(_mm512_cvtps_epi32(intercept), _mm512_set1_epi32(0xFFFF)));
    const __m512i upper = _mm512_set1_epi16(static_cast<int16_t>(0xFF00));
    const auto* low_bytes = static_cast<const uint8_t*>(w.codes) + (low + t) * Format::kBytes;
    const auto* high_bytes = static_cast<const uint8_t*>(w.codes) + (high + t) * Format::kBytes;
    uint8_t* target = block->codes[t] + 64 * half;
    for (int load = 0; load < Format::kLoads; ++load) {
      const __m512i bytes = join(load_bytes(low_bytes + 32 * load), load_bytes(high_bytes + 32 * load));
      for (int part = 0; part < kNibbleHalves; ++part) {
        const __m512i u = _mm512_xor_si512(Format::codes(bytes, part), row.flip);
        const __m512i even = _mm512_mulhi_epu16(_mm512_slli_epi16(u, 8), slopes);
        const __m512i odd = _mm512_mulhi_epu16(_mm512_and_si512(u, upper), slopes);
        const __m512i c0 = _mm512_srli_epi16(_mm512_add_epi16(even, intercepts), Format::kFraction);
        const __m512i c1 = _mm512_srli_epi16(_mm512_add_epi16(odd, intercepts), Format::kFraction);
        _mm512_store_si512(target + (load + 4 * part) * 4 * kWidePanelRows,
                           _mm512_or_si512(c0, _mm512_slli_epi16(c1, 8)));
      }
    }
  }
}

template <typename Format>
void unpack_wide(const MatrixView& w, int64_t panel, int64_t first_tile, int64_t num_tiles, WeightBlock* weights) {
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t row_tile = panel * (kWidePanelRows / kTileRows) + 2 * half;
    if (row_tile < num_row_tiles(w)) {
      unpack_16_rows<Format>(w, row_tile, first_tile, num_tiles, half, &weights->wide);
      continue;
    }
    for (int64_t t = 0; t < num_tiles; ++t) {
      for (int j = 0; j < 8; ++j) {
        _mm512_store_si512(weights->wide.codes[t] + j * 4 * kWidePanelRows + 64 * half, _mm512_setzero_si512());
      }
    }
    _mm512_store_ps(weights->wide.scale + 16 * half, _mm512_setzero_ps());
  }
}

}  // namespace
}  // namespace chainfed

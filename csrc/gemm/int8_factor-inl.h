// AVX2: row tiles of int4 and nf4 to their half of a FactorTile, whose vector j of the row tile is codes[j * 64].
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "gemm/int8_gemm.h"
#include "gemm/int8_pack-inl.h"
#include "gemm/nf4_codebook.h"
#include "quant/tile.h"

namespace chainfed {
namespace {

constexpr float kSmallestRowScale =
    1e-34f;  // below, the row's codes count as zero; its inverse times a factor is finite

// kLargestFactor: a power of two, so that a row of equal scales loses nothing, and no sum of 32 products overflows
// int32.
struct UnpackInt4 {
  static constexpr float kLargestFactor = 16384.0f;  // 32 * 15 * 127 * 16384 < 2^30
  static void tile(const MatrixView& w, int64_t index, uint8_t* codes, __m256* scale, __m256* offset) {
    const uint8_t* source = static_cast<const uint8_t*>(w.codes) + index * kInt4TileBytes;
    const auto* scales = static_cast<const uint16_t*>(w.scales) + index * 16;
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int j = 0; j < 4; ++j) {
      const __m256i bytes = load_bytes(source + 32 * j);
      store_bytes(codes + j * 64, _mm256_and_si256(bytes, nibble));
      store_bytes(codes + (j + 4) * 64, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble));
    }
    *scale = load_f16(scales);
    *offset = load_f16(scales + 8);
  }
};

struct UnpackNf4 {
  static constexpr float kLargestFactor = 4096.0f;  // 32 * 127 * 127 * 4096 < 2^31
  static void tile(const MatrixView& w, int64_t index, uint8_t* codes, __m256* scale, __m256* offset) {
    const uint8_t* source = static_cast<const uint8_t*>(w.codes) + index * kInt4TileBytes;
    const __m256 absmax = _mm256_loadu_ps(static_cast<const float*>(w.scales) + index / 2 * 8);
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kNf4Codebook7.codes)));
    for (int j = 0; j < 4; ++j) {
      const __m256i bytes = load_bytes(source + 32 * j);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
      store_bytes(codes + j * 64, _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, nibble)));
      store_bytes(codes + (j + 4) * 64, _mm256_shuffle_epi8(table, high));
    }
    *scale = _mm256_mul_ps(absmax, _mm256_set1_ps(kNf4Codebook7.slope));
    *offset = _mm256_mul_ps(absmax, _mm256_set1_ps(kNf4Codebook7.intercept));
  }
};

// Eight rows of a block: scale = the largest of the tiles' / kLargestFactor, factors to match. Where a tile's scale is
// NaN or Inf, so is the row's.
template <typename Unpack>
inline void unpack_8_rows(const MatrixView& w, int64_t row_tile, int64_t first_tile, int64_t num_tiles, int64_t row,
                          FactorBlock& block) {
  const int64_t index = row_tile * tiles_per_row(w) + first_tile;
  __m256 scales[kInt8BlockTiles], largest = _mm256_setzero_ps(), poison = _mm256_setzero_ps();
  for (int64_t t = 0; t < num_tiles; ++t) {
    __m256 offset;
    Unpack::tile(w, index + t, block.tiles[t].codes + 4 * row, &scales[t], &offset);
    _mm256_store_ps(block.tiles[t].offset + row, offset);
    largest = _mm256_max_ps(largest, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), scales[t]));
    poison = _mm256_fmadd_ps(scales[t], _mm256_setzero_ps(), poison);
  }
  const __m256 usable = _mm256_cmp_ps(largest, _mm256_set1_ps(kSmallestRowScale), _CMP_GE_OQ);
  const __m256 inverse = _mm256_and_ps(usable, _mm256_div_ps(_mm256_set1_ps(Unpack::kLargestFactor), largest));
  _mm256_store_ps(block.scale + row, _mm256_fmadd_ps(largest, _mm256_set1_ps(1.0f / Unpack::kLargestFactor), poison));
  for (int64_t t = 0; t < num_tiles; ++t) {
    const __m256i factor = _mm256_cvtps_epi32(_mm256_mul_ps(scales[t], inverse));
    _mm256_store_si256(reinterpret_cast<__m256i*>(block.tiles[t].factor + row),
                       _mm256_blend_epi16(factor, _mm256_slli_epi32(factor, 16), 0xAA));
  }
}

template <typename Unpack>
void unpack_factors(const MatrixView& w, int64_t panel, int64_t first_tile, int64_t num_tiles, WeightBlock* weights) {
  FactorBlock& block = weights->factors;
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t row_tile = panel * 2 + half, row = 8 * half;
    if (row_tile < num_row_tiles(w)) {
      unpack_8_rows<Unpack>(w, row_tile, first_tile, num_tiles, row, block);
      continue;
    }
    for (int64_t t = 0; t < num_tiles; ++t) {
      for (int j = 0; j < 8; ++j) store_bytes(block.tiles[t].codes + 64 * j + 4 * row, _mm256_setzero_si256());
      _mm256_store_ps(block.tiles[t].offset + row, _mm256_setzero_ps());
      _mm256_store_si256(reinterpret_cast<__m256i*>(block.tiles[t].factor + row), _mm256_setzero_si256());
    }
    _mm256_store_ps(block.scale + row, _mm256_setzero_ps());
  }
}

}  // namespace
}  // namespace chainfed

// Packing of activations and unpacking of weights in AVX2, shared by the AVX2 and AVX-512 kernels (each file compiles
// its own copy; internal linkage).
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "gemm/int8_gemm.h"
#include "gemm/nf4_codebook.h"
#include "quant/tile.h"

namespace chainfed {
namespace {

constexpr float kSmallestAbsmax = 1.5e-36f;  // 127 times the smallest normal f32: below, the 32 inputs count as zero

inline uint32_t largest(__m256i v) {
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

inline int32_t sum_of_bytes(__m256i bytes) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
  const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1));
  return _mm_cvtsi128_si32(sum);
}

// 32 inputs to codes, sx and s.
inline void quantise_32(const float* x, uint8_t* codes, float* scale, float* scaled_sum) {
  const __m256 v0 = _mm256_loadu_ps(x), v1 = _mm256_loadu_ps(x + 8);
  const __m256 v2 = _mm256_loadu_ps(x + 16), v3 = _mm256_loadu_ps(x + 24);
  const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
  // Magnitudes compare as integers, and NaN and Inf lie above all finite values.
  const __m256i m01 = _mm256_max_epu32(_mm256_and_si256(_mm256_castps_si256(v0), magnitude),
                                       _mm256_and_si256(_mm256_castps_si256(v1), magnitude));
  const __m256i m23 = _mm256_max_epu32(_mm256_and_si256(_mm256_castps_si256(v2), magnitude),
                                       _mm256_and_si256(_mm256_castps_si256(v3), magnitude));
  const uint32_t bits = largest(_mm256_max_epu32(m01, m23));
  const float absmax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(bits))));
  const bool finite = bits < 0x7F800000u;
  if (!finite || absmax < kSmallestAbsmax) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_setzero_si256());
    *scale = *scaled_sum = finite ? 0.0f : __builtin_nanf("");
    return;
  }
  const __m256 inverse = _mm256_set1_ps(127.0f / absmax);
  const __m256i q01 = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(v0, inverse)),
                                         _mm256_cvtps_epi32(_mm256_mul_ps(v1, inverse)));
  const __m256i q23 = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(v2, inverse)),
                                         _mm256_cvtps_epi32(_mm256_mul_ps(v3, inverse)));
  // The packs work inside 128-bit halves; the permutation restores the order.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i q = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(q01, q23), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), q);
  *scale = absmax / 127.0f;
  *scaled_sum = *scale * static_cast<float>(sum_of_bytes(q));
}

template <int64_t Group>
void pack(const float* x, int64_t num_tokens, int64_t num_cols, int64_t num_tiles, uint8_t* group) {
  for (int64_t tile = 0; tile < num_tiles; ++tile, group += group_tile_bytes(Group)) {
    auto* scales = reinterpret_cast<float*>(group + Group * kTileCols);
    const int64_t col = tile * kTileCols, left = num_cols - col;
    for (int64_t t = 0; t < Group; ++t) {
      uint8_t* codes = group + t * kTileCols;
      if (t < num_tokens && left >= kTileCols) {
        quantise_32(x + t * num_cols + col, codes, scales + t, scales + Group + t);
        continue;
      }
      float edge[kTileCols] = {};
      for (int64_t i = 0; t < num_tokens && i < left; ++i) edge[i] = x[t * num_cols + col + i];
      quantise_32(edge, codes, scales + t, scales + Group + t);
    }
  }
}

// ---- One row tile to its half of a WeightTile: vector j of the row tile goes to codes[j * 64]. ----

inline __m256i load_bytes(const uint8_t* bytes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)); }
inline void store_bytes(uint8_t* bytes, __m256i value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), value);
}
inline __m256 load_f16(const uint16_t* halves) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
}

struct UnpackInt4 {
  static constexpr BlockFormat kFormat = BlockFormat::int4;
  static void tile(const MatrixView& w, int64_t index, uint8_t* codes, float* scale, float* offset) {
    const uint8_t* source = static_cast<const uint8_t*>(w.codes) + index * kInt4TileBytes;
    const auto* scales = static_cast<const uint16_t*>(w.scales) + index * 16;
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int j = 0; j < 4; ++j) {
      const __m256i bytes = load_bytes(source + 32 * j);
      store_bytes(codes + j * 64, _mm256_and_si256(bytes, nibble));
      store_bytes(codes + (j + 4) * 64, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble));
    }
    _mm256_storeu_ps(scale, load_f16(scales));
    _mm256_storeu_ps(offset, load_f16(scales + 8));
  }
};

template <const Nf4Codebook& Codebook>
struct UnpackNf4 {
  static constexpr BlockFormat kFormat = BlockFormat::nf4;
  static void tile(const MatrixView& w, int64_t index, uint8_t* codes, float* scale, float* offset) {
    const uint8_t* source = static_cast<const uint8_t*>(w.codes) + index * kInt4TileBytes;
    const __m256 absmax = _mm256_loadu_ps(static_cast<const float*>(w.scales) + index / 2 * 8);
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(Codebook.codes)));
    for (int j = 0; j < 4; ++j) {
      const __m256i bytes = load_bytes(source + 32 * j);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
      store_bytes(codes + j * 64, _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, nibble)));
      store_bytes(codes + (j + 4) * 64, _mm256_shuffle_epi8(table, high));
    }
    _mm256_storeu_ps(scale, _mm256_mul_ps(absmax, _mm256_set1_ps(Codebook.slope)));
    _mm256_storeu_ps(offset, _mm256_mul_ps(absmax, _mm256_set1_ps(Codebook.intercept)));
  }
};

// Unsigned: code + 128 with offset -128 d, for instructions that want unsigned weights.
template <bool Unsigned>
struct UnpackInt8 {
  static constexpr BlockFormat kFormat = BlockFormat::int8;
  static void tile(const MatrixView& w, int64_t index, uint8_t* codes, float* scale, float* offset) {
    const uint8_t* source = static_cast<const uint8_t*>(w.codes) + index * kInt8TileBytes;
    const __m256 scales = load_f16(static_cast<const uint16_t*>(w.scales) + index * 8);
    const __m256i flip = _mm256_set1_epi8(Unsigned ? -128 : 0);
    for (int j = 0; j < 8; ++j) store_bytes(codes + j * 64, _mm256_xor_si256(load_bytes(source + 32 * j), flip));
    _mm256_storeu_ps(scale, scales);
    _mm256_storeu_ps(offset, _mm256_mul_ps(scales, _mm256_set1_ps(Unsigned ? -128.0f : 0.0f)));
  }
};

template <typename Unpack>
void unpack(const MatrixView& w, int64_t panel, int64_t first_tile, int64_t num_tiles, WeightTile* tiles) {
  for (int half = 0; half < 2; ++half) {
    const int64_t row_tile = panel * 2 + half;
    const int64_t index = row_tile * tiles_per_row(w) + first_tile;
    for (int64_t t = 0; t < num_tiles; ++t) {
      uint8_t* codes = tiles[t].codes + 32 * half;
      float *scale = tiles[t].scale + 8 * half, *offset = tiles[t].offset + 8 * half;
      if (row_tile < num_row_tiles(w)) {
        Unpack::tile(w, index + t, codes, scale, offset);
        continue;
      }
      for (int j = 0; j < 8; ++j) store_bytes(codes + 64 * j, _mm256_setzero_si256());
      _mm256_storeu_ps(scale, _mm256_setzero_ps());
      _mm256_storeu_ps(offset, _mm256_setzero_ps());
    }
  }
}

}  // namespace
}  // namespace chainfed

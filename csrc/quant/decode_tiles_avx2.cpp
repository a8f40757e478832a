#include <immintrin.h>

#include <cstdint>

#include "base/transpose-inl.h"
#include "quant/decode_tiles.h"
#include "quant/nf4_table.h"
#include "quant/tile.h"

namespace chainfed {
namespace {

// ---- One vector of eight codes (32-bit integers 0..15 or -128..127) to eight weights ----

struct DecodeInt4 {
  __m256 scale, offset;
  __m256 operator()(__m256i code) const { return _mm256_fmadd_ps(_mm256_cvtepi32_ps(code), scale, offset); }
};

struct DecodeInt8 {
  __m256 scale;
  __m256 operator()(__m256i code) const { return _mm256_mul_ps(_mm256_cvtepi32_ps(code), scale); }
};

struct DecodeNf4 {
  __m256 absmax;
  __m256 operator()(__m256i code) const {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kNf4Table), code);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kNf4Table + 8), code);
    const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));  // bit 3 becomes the sign
    return _mm256_mul_ps(_mm256_blendv_ps(low, high, is_high), absmax);
  }
};

__m256 load_f16(const uint16_t* halves) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
}

template <BlockFormat Format>
struct Tile;

template <>
struct Tile<BlockFormat::int4> {
  const uint8_t* codes;
  const uint16_t* scales;
  Tile(const MatrixView& w, int64_t index)
      : codes(static_cast<const uint8_t*>(w.codes) + index * kInt4TileBytes),
        scales(static_cast<const uint16_t*>(w.scales) + index * 16) {}
  DecodeInt4 lanes() const { return {load_f16(scales), load_f16(scales + 8)}; }
  DecodeInt4 one_row(const DecodeInt4& all, int r) const {
    const __m256i pick = _mm256_set1_epi32(r);
    return {_mm256_permutevar8x32_ps(all.scale, pick), _mm256_permutevar8x32_ps(all.offset, pick)};
  }
};

template <>
struct Tile<BlockFormat::nf4> {
  const uint8_t* codes;
  const float* scales;
  Tile(const MatrixView& w, int64_t index)
      : codes(static_cast<const uint8_t*>(w.codes) + index * kInt4TileBytes),
        scales(static_cast<const float*>(w.scales) + index / 2 * 8) {}
  DecodeNf4 lanes() const { return {_mm256_loadu_ps(scales)}; }
  DecodeNf4 one_row(const DecodeNf4&, int r) const { return {_mm256_set1_ps(scales[r])}; }
};

template <>
struct Tile<BlockFormat::int8> {
  const uint8_t* codes;
  const uint16_t* scales;
  Tile(const MatrixView& w, int64_t index)
      : codes(static_cast<const uint8_t*>(w.codes) + index * kInt8TileBytes),
        scales(static_cast<const uint16_t*>(w.scales) + index * 8) {}
  DecodeInt8 lanes() const { return {load_f16(scales)}; }
  DecodeInt8 one_row(const DecodeInt8& all, int r) const {
    return {_mm256_permutevar8x32_ps(all.scale, _mm256_set1_epi32(r))};
  }
};

__m256i load_codes(const uint8_t* codes, int j) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * j));
}

template <BlockFormat Format>
void by_column(const MatrixView& w, int64_t row_tile, int64_t first_tile, int64_t num_tiles, float* out,
               int64_t stride) {
  const __m256i nibble = _mm256_set1_epi32(15);
  const int64_t index = row_tile * tiles_per_row(w) + first_tile;
  for (int64_t t = 0; t < num_tiles; ++t, out += kTileCols * stride) {
    const Tile<Format> tile(w, index + t);
    const auto decode = tile.lanes();
    // Lane r of a vector holds four neighbouring columns of row r, one a byte: the transpose costs only shifts.
    if constexpr (Format == BlockFormat::int8) {
      for (int j = 0; j < 8; ++j) {
        const __m256i bytes = load_codes(tile.codes, j);
        float* column = out + 4 * j * stride;
        _mm256_storeu_ps(column, decode(_mm256_srai_epi32(_mm256_slli_epi32(bytes, 24), 24)));
        _mm256_storeu_ps(column + stride, decode(_mm256_srai_epi32(_mm256_slli_epi32(bytes, 16), 24)));
        _mm256_storeu_ps(column + 2 * stride, decode(_mm256_srai_epi32(_mm256_slli_epi32(bytes, 8), 24)));
        _mm256_storeu_ps(column + 3 * stride, decode(_mm256_srai_epi32(bytes, 24)));
      }
    } else {
      for (int j = 0; j < 4; ++j) {
        const __m256i bytes = load_codes(tile.codes, j);
        float* low = out + 4 * j * stride;
        float* high = low + 16 * stride;
        for (int i = 0; i < 4; ++i) {
          const __m256i shifted = _mm256_srli_epi32(bytes, 8 * i);
          _mm256_storeu_ps(low + i * stride, decode(_mm256_and_si256(shifted, nibble)));
          _mm256_storeu_ps(high + i * stride, decode(_mm256_and_si256(_mm256_srli_epi32(shifted, 4), nibble)));
        }
      }
    }
  }
}

// Four vectors [j][row][4 bytes] to rows of 16 bytes: rows[p] holds row p in its lower and row p + 4 in its upper half.
void gather_rows_of_bytes(const uint8_t* codes, __m256i rows[4]) {
  const __m256i v0 = load_codes(codes, 0), v1 = load_codes(codes, 1);
  const __m256i v2 = load_codes(codes, 2), v3 = load_codes(codes, 3);
  const __m256i a = _mm256_unpacklo_epi32(v0, v1), b = _mm256_unpackhi_epi32(v0, v1);
  const __m256i c = _mm256_unpacklo_epi32(v2, v3), d = _mm256_unpackhi_epi32(v2, v3);
  rows[0] = _mm256_unpacklo_epi64(a, c);
  rows[1] = _mm256_unpackhi_epi64(a, c);
  rows[2] = _mm256_unpacklo_epi64(b, d);
  rows[3] = _mm256_unpackhi_epi64(b, d);
}

__m128i half_of(__m256i value, int upper) {
  return upper ? _mm256_extracti128_si256(value, 1) : _mm256_castsi256_si128(value);
}

template <typename Decode>
void store_16(float* out, __m128i bytes, const Decode& decode) {
  _mm256_storeu_ps(out, decode(_mm256_cvtepu8_epi32(bytes)));
  _mm256_storeu_ps(out + 8, decode(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))));
}

void store_16_signed(float* out, __m128i bytes, const DecodeInt8& decode) {
  _mm256_storeu_ps(out, decode(_mm256_cvtepi8_epi32(bytes)));
  _mm256_storeu_ps(out + 8, decode(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))));
}

template <BlockFormat Format>
void by_row(const MatrixView& w, int64_t row_tile, int64_t tile_column, float* out, int64_t stride, int64_t half) {
  const Tile<Format> tile(w, row_tile * tiles_per_row(w) + tile_column);
  const auto all = tile.lanes();
  __m256i first[4], second[4];
  gather_rows_of_bytes(tile.codes, first);
  if constexpr (Format == BlockFormat::int8) gather_rows_of_bytes(tile.codes + 128, second);
  const __m128i nibble = _mm_set1_epi8(15);
  for (int r = 0; r < kTileRows; ++r, out += stride) {
    const auto decode = tile.one_row(all, r);
    const __m128i bytes = half_of(first[r % 4], r / 4);
    if constexpr (Format == BlockFormat::int8) {
      store_16_signed(out, bytes, decode);
      store_16_signed(out + half, half_of(second[r % 4], r / 4), decode);
    } else {
      store_16(out, _mm_and_si128(bytes, nibble), decode);
      store_16(out + half, _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), decode);
    }
  }
}

// ---- Row-major matrices ----

template <BlockFormat Format>
__m256 load_8(const MatrixView& w, int64_t position) {
  if constexpr (Format == BlockFormat::f32) {
    return _mm256_loadu_ps(static_cast<const float*>(w.codes) + position);
  } else {
    const auto* source = static_cast<const uint16_t*>(w.codes) + position;
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
}

template <BlockFormat Format>
void by_column_row_major(const MatrixView& w, int64_t row_tile, int64_t first_tile, int64_t num_tiles, float* out,
                         int64_t stride) {
  const int64_t row = row_tile * kTileRows;
  if (row + kTileRows > w.num_rows || (first_tile + num_tiles) * kTileCols > w.num_cols) {
    kDecodeTilesScalar[static_cast<int>(Format)].by_column(w, row_tile, first_tile, num_tiles, out, stride);
    return;
  }
  for (int64_t c = 0; c < num_tiles * kTileCols; c += 8) {
    __m256 v[8];
    for (int r = 0; r < 8; ++r) v[r] = load_8<Format>(w, (row + r) * w.num_cols + first_tile * kTileCols + c);
    transpose_8x8(v);
    for (int r = 0; r < 8; ++r) _mm256_storeu_ps(out + (c + r) * stride, v[r]);
  }
}

template <BlockFormat Format>
void by_row_row_major(const MatrixView& w, int64_t row_tile, int64_t tile, float* out, int64_t stride, int64_t half) {
  const int64_t row = row_tile * kTileRows, col = tile * kTileCols;
  if (row + kTileRows > w.num_rows || col + kTileCols > w.num_cols) {
    kDecodeTilesScalar[static_cast<int>(Format)].by_row(w, row_tile, tile, out, stride, half);
    return;
  }
  for (int r = 0; r < kTileRows; ++r, out += stride) {
    const int64_t position = (row + r) * w.num_cols + col;
    _mm256_storeu_ps(out, load_8<Format>(w, position));
    _mm256_storeu_ps(out + 8, load_8<Format>(w, position + 8));
    _mm256_storeu_ps(out + half, load_8<Format>(w, position + 16));
    _mm256_storeu_ps(out + half + 8, load_8<Format>(w, position + 24));
  }
}

}  // namespace

const DecodeTiles kDecodeTilesAvx2[5] = {
    {&by_column<BlockFormat::int4>, &by_row<BlockFormat::int4>},
    {&by_column<BlockFormat::nf4>, &by_row<BlockFormat::nf4>},
    {&by_column<BlockFormat::int8>, &by_row<BlockFormat::int8>},
    {&by_column_row_major<BlockFormat::bf16>, &by_row_row_major<BlockFormat::bf16>},
    {&by_column_row_major<BlockFormat::f32>, &by_row_row_major<BlockFormat::f32>},
};

}  // namespace chainfed

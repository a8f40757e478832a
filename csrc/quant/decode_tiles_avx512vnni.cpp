// Rows of 4-bit tiles through a table of sixteen weights in one register: `vpermps` reads the lowest four bits of a
// lane. Everything else is AVX2's.
#include <immintrin.h>

#include <cstdint>

#include "quant/decode_tiles.h"
#include "quant/nf4_table.h"
#include "quant/tile.h"

namespace chainfed {
namespace {

// The sixteen weights of each row of a tile.
struct Int4Table {
  alignas(32) float scale[8], offset[8];
  __m512 codes;
  Int4Table(const MatrixView& w, int64_t index) {
    const auto* scales = static_cast<const uint16_t*>(w.scales) + index * 16;
    _mm256_store_ps(scale, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales))));
    _mm256_store_ps(offset, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 8))));
    codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  __m512 row(int r) const { return _mm512_fmadd_ps(codes, _mm512_set1_ps(scale[r]), _mm512_set1_ps(offset[r])); }
};

struct Nf4Table {
  const float* absmax;
  Nf4Table(const MatrixView& w, int64_t index) : absmax(static_cast<const float*>(w.scales) + index / 2 * 8) {}
  __m512 row(int r) const { return _mm512_mul_ps(_mm512_loadu_ps(kNf4Table), _mm512_set1_ps(absmax[r])); }
};

// Bytes [j][row][4] of 16 neighbouring columns, j in 0..3: 32 bits a row and j.
__m128i row_of_bytes(const uint8_t* codes, int r) {
  int32_t quads[4];
  for (int j = 0; j < 4; ++j) __builtin_memcpy(&quads[j], codes + 32 * j + 4 * r, 4);
  return _mm_setr_epi32(quads[0], quads[1], quads[2], quads[3]);
}

template <typename Table>
void by_row(const MatrixView& w, int64_t row_tile, int64_t tile, float* out, int64_t stride, int64_t half) {
  const int64_t index = row_tile * tiles_per_row(w) + tile;
  const auto* codes = static_cast<const uint8_t*>(w.codes) + index * kInt4TileBytes;
  const Table table(w, index);
  for (int r = 0; r < kTileRows; ++r, out += stride) {
    const __m512i both = _mm512_cvtepu8_epi32(row_of_bytes(codes, r));
    const __m512 weights = table.row(r);
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(both, weights));
    _mm512_storeu_ps(out + half, _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), weights));
  }
}

template <BlockFormat Format>
void by_column(const MatrixView& w, int64_t row_tile, int64_t first_tile, int64_t num_tiles, float* out,
               int64_t stride) {
  kDecodeTilesAvx2[static_cast<int>(Format)].by_column(w, row_tile, first_tile, num_tiles, out, stride);
}

template <BlockFormat Format>
void by_row_avx2(const MatrixView& w, int64_t row_tile, int64_t tile, float* out, int64_t stride, int64_t half) {
  kDecodeTilesAvx2[static_cast<int>(Format)].by_row(w, row_tile, tile, out, stride, half);
}

}  // namespace

const DecodeTiles kDecodeTilesAvx512[5] = {
    {&by_column<BlockFormat::int4>, &by_row<Int4Table>},
    {&by_column<BlockFormat::nf4>, &by_row<Nf4Table>},
    {&by_column<BlockFormat::int8>, &by_row_avx2<BlockFormat::int8>},
    {&by_column<BlockFormat::bf16>, &by_row_avx2<BlockFormat::bf16>},
    {&by_column<BlockFormat::f32>, &by_row_avx2<BlockFormat::f32>},
};

}  // namespace chainfed

// The oracle: the formula of int8_gemm.h in plain loops. Codes of int8 weights are stored as they are; nf4 uses the
// 8-bit codebook.
#include <cmath>
#include <cstring>

#include "base/half.h"
#include "gemm/int8_gemm.h"
#include "gemm/nf4_codebook.h"
#include "quant/tile.h"

namespace chainfed {
namespace {

constexpr int64_t kGroup = 4;
constexpr float kSmallestAbsmax = 1.5e-36f;  // 127 times the smallest normal f32: below, the 32 inputs count as zero

// Codes of 32 inputs; returns the scale.
float quantise_32(const float* x, int64_t count, int8_t* codes) {
  float absmax = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    finite = finite && std::isfinite(x[i]);
    absmax = std::fabs(x[i]) > absmax ? std::fabs(x[i]) : absmax;
  }
  std::memset(codes, 0, kTileCols);
  if (!finite) return NAN;
  if (absmax < kSmallestAbsmax) return 0.0f;
  const float inverse = 127.0f / absmax;
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<int8_t>(std::nearbyint(x[i] * inverse));
  return absmax * (1.0f / 127.0f);
}

void pack(const float* x, int64_t num_tokens, int64_t num_cols, int64_t num_tiles, uint8_t* group) {
  for (int64_t tile = 0; tile < num_tiles; ++tile, group += group_tile_bytes(kGroup)) {
    auto* codes = reinterpret_cast<int8_t*>(group);
    auto* scales = reinterpret_cast<float*>(group + kGroup * kTileCols);
    std::memset(group, 0, group_tile_bytes(kGroup));
    const int64_t col = tile * kTileCols, left = num_cols - col;
    const int64_t count = left < 0 ? 0 : left < kTileCols ? left : kTileCols;
    for (int64_t t = 0; t < num_tokens; ++t) {
      scales[t] = quantise_32(x + t * num_cols + (count > 0 ? col : 0), count, codes + t * kTileCols);
      int sum = 0;
      for (int64_t i = 0; i < kTileCols; ++i) sum += codes[t * kTileCols + i];
      scales[kGroup + t] = scales[t] * static_cast<float>(sum);
    }
  }
}

// scale and offset such that weight = scale * code + offset, and the code's byte.
template <BlockFormat Format>
void unpack_row(const MatrixView& w, int64_t index, int row, int panel_row, WeightTile& tile) {
  const auto* source = static_cast<const uint8_t*>(w.codes) + index * tile_bytes(Format);
  const auto* half_scales = static_cast<const uint16_t*>(w.scales);
  for (int col = 0; col < kTileCols; ++col) {
    uint8_t& code = tile.codes[col / 4 * kInt8PanelRows * 4 + panel_row * 4 + col % 4];
    if constexpr (Format == BlockFormat::int4) {
      code = static_cast<uint8_t>(nibble_at(source, row, col));
    } else if constexpr (Format == BlockFormat::nf4) {
      code = kNf4Codebook8.codes[nibble_at(source, row, col)];
    } else {
      code = source[int8_position(row, col)];
    }
  }
  if constexpr (Format == BlockFormat::int4) {
    tile.scale[panel_row] = f16_to_float(half_scales[index * 16 + row]);
    tile.offset[panel_row] = f16_to_float(half_scales[index * 16 + 8 + row]);
  } else if constexpr (Format == BlockFormat::nf4) {
    const float absmax = static_cast<const float*>(w.scales)[index / 2 * 8 + row];
    tile.scale[panel_row] = absmax * kNf4Codebook8.slope;
    tile.offset[panel_row] = absmax * kNf4Codebook8.intercept;
  } else {
    tile.scale[panel_row] = f16_to_float(half_scales[index * 8 + row]);
    tile.offset[panel_row] = 0.0f;
  }
}

template <BlockFormat Format>
void unpack(const MatrixView& w, int64_t panel, int64_t first_tile, int64_t num_tiles, WeightBlock* weights) {
  WeightTile* tiles = weights->tiles;
  for (int64_t t = 0; t < num_tiles; ++t) {
    std::memset(&tiles[t], 0, sizeof(WeightTile));
    for (int panel_row = 0; panel_row < kInt8PanelRows; ++panel_row) {
      const int64_t row_tile = panel * 2 + panel_row / kTileRows;
      if (row_tile >= num_row_tiles(w)) break;
      unpack_row<Format>(w, row_tile * tiles_per_row(w) + first_tile + t, panel_row % kTileRows, panel_row, tiles[t]);
    }
  }
}

template <typename Code>
void multiply(const WeightBlock& weights, const uint8_t* group, int64_t num_tiles, int64_t num_tokens,
              const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t n = 0; n < kInt8PanelRows; ++n) {
      float sum = from[t * from_stride + n];
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        const WeightTile& w = weights.tiles[tile];
        const uint8_t* activations = group + tile * group_tile_bytes(kGroup);
        const auto* x = reinterpret_cast<const int8_t*>(activations) + t * kTileCols;
        const auto* scales = reinterpret_cast<const float*>(activations + kGroup * kTileCols);
        int dot = 0;
        for (int64_t col = 0; col < kTileCols; ++col) {
          dot += static_cast<Code>(w.codes[col / 4 * kInt8PanelRows * 4 + n * 4 + col % 4]) * x[col];
        }
        sum += static_cast<float>(dot) * (w.scale[n] * scales[t]);
        sum += w.offset[n] * scales[kGroup + t];
      }
      to[t * to_stride + n] = sum;
    }
  }
}

}  // namespace

const Int8Level kInt8Scalar = {kGroup,
                               kInt8PanelRows,
                               {{1, &pack, &unpack<BlockFormat::int4>, &multiply<uint8_t>},
                                {1, &pack, &unpack<BlockFormat::nf4>, &multiply<uint8_t>},
                                {1, &pack, &unpack<BlockFormat::int8>, &multiply<int8_t>}}};

}  // namespace chainfed

#include "gemm/f32_gemm.h"

#include <algorithm>
#include <cstring>

#include "base/fetch_rows.h"
#include "base/simd_level.h"
#include "base/thread_pool.h"
#include "base/workspace.h"
#include "quant/decode_tiles.h"
#include "quant/tile.h"

namespace chainfed {
namespace {

constexpr SimdTable<const F32Kernels*> kTable = CHAINFED_LEVELS(
    &kF32KernelsScalar, &kF32KernelsAvx2, &kF32KernelsAvx512, &kF32KernelsNeon, &kF32KernelsNeon, &kF32KernelsNeon);

constexpr int64_t kTilesPerDepth = kGemmDepth / kTileCols;
constexpr int64_t kRowTilesPerDepth = kGemmDepth / kTileRows;
constexpr int64_t kRowTilesPerPanel = kGemmPanelCols / kTileRows;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What stays the same for all blocks of one product.
struct Product {
  const F32Kernels& kernels;
  const DecodeTiles& decode;
  const MatrixView& w;
  bool transposed;  // forward: B = W^T
  int64_t depth, num_cols;
  const float* bias;
  bool add;
  float* c;
};

// B[q_begin .., 32 p's of panel] as 32 / micro_cols sub-panels of [256, micro_cols]; rows and columns beyond the
// matrix hold finite values that are multiplied by nothing or dropped.
void decode_panel(const Product& product, int64_t panel, int64_t q_begin, int64_t depth, float* out) {
  const int64_t width = product.kernels.micro_cols;
  const MatrixView& w = product.w;
  if (product.transposed) {
    const int64_t num_row_tiles = divide_up(w.num_rows, kTileRows);
    for (int64_t t = 0; t < kRowTilesPerPanel; ++t) {
      const int64_t row_tile = panel * kRowTilesPerPanel + t;
      if (row_tile >= num_row_tiles) break;
      float* lane = out + t * kTileRows / width * width * kGemmDepth + t * kTileRows % width;
      product.decode.by_column(w, row_tile, q_begin / kTileCols, divide_up(depth, kTileCols), lane, width);
    }
    return;
  }
  const int64_t half = width == kGemmPanelCols ? 16 : 16 / width * width * kGemmDepth;
  const int64_t per_row = tiles_per_row(w), codes = tile_bytes(w.format);
  const bool tiled = w.format != BlockFormat::bf16 && w.format != BlockFormat::f32;
  for (int64_t t = 0; t < divide_up(depth, kTileRows); ++t) {
    if (tiled &&
        panel + 1 < per_row) {  // the next panel's tile: a page away from its neighbours, out of any prefetcher's sight
      const char* next = static_cast<const char*>(w.codes) + ((q_begin / kTileRows + t) * per_row + panel + 1) * codes;
      for (int64_t line = 0; line < codes; line += 64) __builtin_prefetch(next + line, 0, 2);
    }
    product.decode.by_row(w, q_begin / kTileRows + t, panel, out + t * kTileRows * width, width, half);
  }
}

// One sub-panel against rows [begin, end) of the packed block of A.
void multiply_rows(const Product& product, const float* packed, const float* panel, int64_t depth, int64_t begin,
                   int64_t end, int64_t col, const float* start, float* c) {
  const F32Kernels& kernels = product.kernels;
  const int64_t width = std::min(kernels.micro_cols, product.num_cols - col);
  for (int64_t row = begin; row < end; row += kernels.micro_rows) {
    const int64_t rows = std::min(kernels.micro_rows, end - row);
    float* target = c + row * product.num_cols + col;
    if (width == kernels.micro_cols) {
      fetch_rows(target, product.num_cols, rows, width);
      kernels.multiply(packed + row * depth, panel, depth, rows, start, target, product.num_cols);
      continue;
    }
    alignas(64) float edge[kGemmMaxMicroRows * kGemmPanelCols] = {};
    if (start == nullptr) {
      for (int64_t i = 0; i < rows; ++i) {
        std::memcpy(edge + i * kernels.micro_cols, target + i * product.num_cols, width * sizeof(float));
      }
    }
    kernels.multiply(packed + row * depth, panel, depth, rows, start, edge, kernels.micro_cols);
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(target + i * product.num_cols, edge + i * kernels.micro_cols, width * sizeof(float));
    }
  }
}

// One block of q for all panels and the num_rows packed rows of A.
void multiply_block(const Product& product, const float* packed, int64_t num_rows, int64_t q_begin, float* c) {
  const int64_t depth = std::min(kGemmDepth, product.depth - q_begin);
  const int64_t num_panels = divide_up(product.num_cols, kGemmPanelCols);
  const int64_t micro_rows = product.kernels.micro_rows, micro_cols = product.kernels.micro_cols;
  // Few panels: share the rows out too, and let each part decode the panel for itself.
  const int64_t num_strips = divide_up(num_rows, micro_rows);
  const int64_t num_parts = std::clamp<int64_t>(divide_up(2 * num_threads(), num_panels), 1, num_strips);
  parallel_ranges(num_panels * num_parts, [&](int64_t begin, int64_t end, int) {
    alignas(64) float panel_values[kGemmDepth * kGemmPanelCols] = {};
    alignas(64) float start_values[kGemmPanelCols];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / num_parts, part = task % num_parts;
      const int64_t row_begin = num_strips * part / num_parts * micro_rows;
      const int64_t row_end = std::min(num_rows, num_strips * (part + 1) / num_parts * micro_rows);
      decode_panel(product, panel, q_begin, depth, panel_values);
      for (int64_t col = panel * kGemmPanelCols, sub = 0; sub < kGemmPanelCols / micro_cols; ++sub, col += micro_cols) {
        if (col >= product.num_cols) break;
        const bool first = q_begin == 0 && !product.add;
        for (int64_t p = 0; first && p < micro_cols; ++p) {
          start_values[p] = product.bias != nullptr && col + p < product.num_cols ? product.bias[col + p] : 0.0f;
        }
        multiply_rows(product, packed, panel_values + sub * micro_cols * kGemmDepth, depth, row_begin, row_end, col,
                      first ? start_values : nullptr, c);
      }
    }
  });
}

void multiply(const Product& product, const float* a, int64_t num_rows, float* packed) {
  const int64_t micro_rows = product.kernels.micro_rows;
  const int64_t num_chunks = divide_up(num_rows, kGemmMaxRows);
  const int64_t chunk_rows = divide_up(divide_up(num_rows, num_chunks), micro_rows) * micro_rows;
  for (int64_t row = 0; row < num_rows; row += chunk_rows) {
    const int64_t rows = std::min(chunk_rows, num_rows - row);
    for (int64_t q = 0; q < product.depth; q += kGemmDepth) {
      const int64_t depth = std::min(kGemmDepth, product.depth - q);
      parallel_for(divide_up(rows, micro_rows), [&](int64_t strip) {
        const int64_t first = strip * micro_rows;
        product.kernels.pack(a + (row + first) * product.depth + q, product.depth, std::min(micro_rows, rows - first),
                             depth, packed + first * depth);
      });
      multiply_block(product, packed, rows, q, product.c + row * product.num_cols);
    }
  }
}

}  // namespace

void f32_forward(const MatrixView& w, const float* x, int64_t num_tokens, const float* bias, float* out,
                 void* workspace) {
  const Product product{*select(kTable), decode_tiles(w.format), w, true, w.num_cols, w.num_rows, bias, false, out};
  multiply(product, x, num_tokens, static_cast<float*>(workspace));
}

void f32_grad_input(const MatrixView& w, const float* grad_out, int64_t num_tokens, bool add, float* out,
                    void* workspace) {
  const Product product{*select(kTable), decode_tiles(w.format), w, false, w.num_rows, w.num_cols, nullptr, add, out};
  multiply(product, grad_out, num_tokens, static_cast<float*>(workspace));
}

int64_t f32_workspace_bytes(int64_t num_tokens, int64_t depth) {
  // A chunk is rounded up to whole micro-kernels.
  const int64_t rows = std::min(num_tokens, kGemmMaxRows) + kGemmMaxMicroRows;
  Workspace measured(nullptr);
  measured.take<float>(rows * std::min(depth, kGemmDepth));
  return measured.used_bytes();
}

}  // namespace chainfed

#include "cuda/linear.h"

#include <algorithm>

#include "cuda/exact_linear.h"
#include "cuda/fused.h"
#include "cuda/library_product.h"
#include "cuda/prepare.h"
#include "cuda/weights.h"

namespace chainfed::cuda {
namespace {

// Decoded weights at a time: the largest matrix of an 8B model whole (112 MiB). Parts of a matrix leave processors idle
// in each product's last wave, and going back each part adds to the result in memory. docs/LOG.md has the arithmetic.
constexpr int64_t kScratchBytes = int64_t{128} << 20;

int64_t summed_length(const LinearCall& call) {
  return call.direction == Direction::forward ? call.w.num_cols : call.w.num_rows;
}

// Rows of W that fit the scratch, whole tiles.
int64_t rows_at_a_time(int64_t num_rows, int64_t stride) {
  return std::min(round_up_to(num_rows, 8), std::max<int64_t>(8, kScratchBytes / (2 * stride) / 8 * 8));
}

struct FusedPieces {
  uint16_t* activations;
  float* row_scale;
  float* partial;
};

FusedPieces carve_fused(Workspace& workspace, const Device& device, Direction direction, int64_t num_tokens,
                        int64_t num_rows, int64_t num_cols) {
  const int64_t length = direction == Direction::forward ? num_cols : num_rows;
  FusedPieces pieces{};
  pieces.activations = workspace.take<uint16_t>(num_tokens * round_up_to(length, kStepCols));
  pieces.row_scale = workspace.take<float>(num_tokens);
  pieces.partial = workspace.take<float>(fused_partial_floats(device, direction, num_tokens, num_rows, num_cols));
  return pieces;
}

struct LibraryPieces {
  uint16_t *activations, *weights;
  char* own;
};

LibraryPieces carve_library(Workspace& workspace, BlockFormat format, Direction direction, int64_t num_tokens,
                            int64_t num_rows, int64_t num_cols) {
  const int64_t length = direction == Direction::forward ? num_cols : num_rows, stride = round_up_to(num_cols, 8);
  LibraryPieces pieces{};
  pieces.activations = workspace.take<uint16_t>(num_tokens * round_up_to(length, 8));
  const bool in_place = format == BlockFormat::bf16 && stride == num_cols;
  pieces.weights = in_place ? nullptr : workspace.take<uint16_t>(rows_at_a_time(num_rows, stride) * stride);
  pieces.own = workspace.take<char>(kLibraryWorkspaceBytes);
  return pieces;
}

void exact(Stream stream, const LinearCall& call) {
  const ExactLinearArgs args{call.w,
                             tiles_in_row(call.w.format, call.w.num_cols),
                             call.x,
                             call.bias,
                             call.out,
                             call.num_tokens,
                             summed_length(call),
                             call.accumulate};
  if (call.direction == Direction::forward) {
    using Kernel = ExactLinear<Direction::forward>;
    launch<Kernel>(stream, Kernel::grid(call.num_tokens, call.w.num_rows), args);
  } else {
    using Kernel = ExactLinear<Direction::grad>;
    launch<Kernel>(stream, Kernel::grid(call.num_tokens, call.w.num_cols), args);
  }
}

void fused(const Device& device, Stream stream, const LinearCall& call, void* memory) {
  Workspace workspace(memory);
  const FusedPieces pieces =
      carve_fused(workspace, device, call.direction, call.num_tokens, call.w.num_rows, call.w.num_cols);
  const int64_t length = summed_length(call), cols = round_up_to(length, kStepCols);
  launch<Prepare>(stream, Prepare::grid(call.num_tokens),
                  {call.x, call.num_tokens, length, cols, call.direction, pieces.activations, pieces.row_scale});
  fused_linear(device, stream,
               {call.w, call.direction, pieces.activations, cols, pieces.row_scale, call.num_tokens, call.bias,
                call.out, call.accumulate, pieces.partial});
}

// Weights are decoded a block of rows at a time: rows are outputs going forward (each block fills its columns of out),
// and summed over going back (the first block sets out, the others add).
void library(const Device& device, Stream stream, const LinearCall& call, void* memory) {
  Workspace workspace(memory);
  const MatrixView& w = call.w;
  const LibraryPieces pieces =
      carve_library(workspace, w.format, call.direction, call.num_tokens, w.num_rows, w.num_cols);
  const bool forward = call.direction == Direction::forward;
  const int64_t length = summed_length(call), x_stride = round_up_to(length, 8), stride = round_up_to(w.num_cols, 8);
  launch<ToBf16>(stream, ToBf16::grid(call.num_tokens), {call.x, length, x_stride, pieces.activations});
  const int64_t rows_in_block = pieces.weights == nullptr ? w.num_rows : rows_at_a_time(w.num_rows, stride);
  for (int64_t row = 0; row < w.num_rows; row += rows_in_block) {
    const int64_t end = std::min(w.num_rows, row + rows_in_block);
    const uint16_t* weights = static_cast<const uint16_t*>(w.codes);
    if (pieces.weights != nullptr) {
      decode_rows(stream, w, row, end, stride, pieces.weights);
      weights = pieces.weights;
    }
    library_product(device.library, stream,
                    {call.direction, weights, end - row, w.num_cols, stride,
                     forward ? pieces.activations : pieces.activations + row, call.num_tokens, x_stride,
                     call.bias == nullptr ? nullptr : call.bias + row, forward ? call.out + row : call.out,
                     forward ? w.num_rows : w.num_cols, call.accumulate || (!forward && row > 0), pieces.own});
  }
}

}  // namespace

void decode_rows(Stream stream, const MatrixView& w, int64_t row_begin, int64_t row_end, int64_t stride,
                 uint16_t* out) {
  launch<ToBf16Rows>(stream, ToBf16Rows::grid(row_end - row_begin, stride),
                     {w, tiles_in_row(w.format, w.num_cols), row_begin, row_end, stride, out});
}

bool is_tiled(BlockFormat format) { return format != BlockFormat::bf16 && format != BlockFormat::f32; }

int64_t tiles_in_row(BlockFormat format, int64_t num_cols) {
  const int64_t multiple = format == BlockFormat::nf4 ? kNf4BlockCols : kTileCols;
  return round_up_to(num_cols, multiple) / kTileCols;
}

MatrixView rows_of(const MatrixView& w, int64_t first_row, int64_t num_rows) {
  MatrixView part = w;
  part.num_rows = num_rows;
  const auto* codes = static_cast<const char*>(w.codes);
  if (!is_tiled(w.format)) {
    part.codes = codes + first_row * w.num_cols * (w.format == BlockFormat::bf16 ? 2 : 4);
    return part;
  }
  const int64_t tiles = first_row / kTileRows * tiles_in_row(w.format, w.num_cols);
  part.codes = codes + tiles * (w.format == BlockFormat::int8 ? kInt8TileBytes : kInt4TileBytes);
  const int64_t scale_bytes = w.format == BlockFormat::int4 ? 32 : 16;  // nf4: 32 for two tiles
  part.scales = static_cast<const char*>(w.scales) + tiles * scale_bytes;
  return part;
}

void fused_linear(const Device& device, Stream stream, const FusedCall& call) {
  switch (call.w.format) {
    case BlockFormat::int4:
      return fused_int4(device, stream, call);
    case BlockFormat::nf4:
      return fused_nf4(device, stream, call);
    default:
      return fused_int8(device, stream, call);
  }
}

int64_t fused_partial_floats(const Device& device, Direction direction, int64_t num_tokens, int64_t num_rows,
                             int64_t num_cols) {
  const bool forward = direction == Direction::forward;
  const int64_t outputs = forward ? num_rows : num_cols, length = forward ? num_cols : num_rows;
  const int64_t splits = num_splits(device, num_tokens, outputs, round_up_to(length, kStepCols) / kStepCols);
  return splits > 1 ? splits * num_tokens * outputs : 0;
}

void linear(const Device& device, Stream stream, const LinearCall& call, void* workspace) {
  if (call.num_tokens == 0) return;
  if (call.precision == Precision::exact) {
    exact(stream, call);
  } else if (device.library != nullptr && (!is_tiled(call.w.format) || call.num_tokens >= device.library_from_tokens)) {
    library(device, stream, call, workspace);
  } else if (is_tiled(call.w.format)) {
    fused(device, stream, call, workspace);
  } else {
    exact(stream, call);
  }
}

int64_t linear_workspace_bytes(const Device& device, BlockFormat format, Direction direction, int64_t num_tokens,
                               int64_t num_rows, int64_t num_cols) {
  if (num_tokens <= 0) return 0;
  Workspace workspace(nullptr);
  if (device.library != nullptr && (!is_tiled(format) || num_tokens >= device.library_from_tokens)) {
    carve_library(workspace, format, direction, num_tokens, num_rows, num_cols);
  } else if (is_tiled(format)) {
    carve_fused(workspace, device, direction, num_tokens, num_rows, num_cols);
  }
  return workspace.used_bytes();
}

}  // namespace chainfed::cuda

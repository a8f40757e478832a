// The quantised linear on a device: which kernels run, in which order, in which workspace. Host code, the same for the
// CUDA build and the emulated one. Input is valid (csrc/bind checks); nothing synchronises or allocates.
//   exact     every format, f32 throughout
//   fused     int4, nf4, int8: halves on tensor cores, 11 bits a factor, f32 sums. Few tokens: the sum is split over
//             blocks so that the device is filled, and the parts are added in order (same result every run)
//   library   weights decoded once into a bf16 scratch of bounded size, then cuBLASLt: many tokens where it is faster
#pragma once
#include <cstdint>

#include "base/workspace.h"
#include "chainfed/kernels.h"
#include "cuda/launch.h"
#include "cuda/tile_codec.h"

namespace chainfed::cuda {

// What of a device decides how kernels run; filled once a device.
struct Device {
  int index = 0;
  int num_processors = 1;
  // From this many tokens on the library product is used; INT64_MAX where cuBLASLt is missing. Defaults: crossover.h.
  int64_t library_from_tokens = INT64_MAX;
  void* library = nullptr;  // of library_product.h
};

void linear(const Device& device, Stream stream, const LinearCall& call, void* workspace);
// Enough for both precisions and directions `forward` (x [M, K]) or `grad` (x [M, N]).
int64_t linear_workspace_bytes(const Device& device, BlockFormat format, Direction direction, int64_t num_tokens,
                               int64_t num_rows, int64_t num_cols);

// The fused product of activations that are already f16 in tile order (the head's softmax weights). partial: as much
// as fused_partial_bytes says.
struct FusedCall {
  MatrixView w;
  Direction direction;
  const uint16_t* activations;  // [M, activation_cols]
  int64_t activation_cols;
  const float* row_scale;
  int64_t num_tokens;
  const float* bias;
  float* out;
  bool accumulate;
  float* partial;
};
void fused_linear(const Device& device, Stream stream, const FusedCall& call);
int64_t fused_partial_floats(const Device& device, Direction direction, int64_t num_tokens, int64_t num_rows,
                             int64_t num_cols);

// Rows [row_begin, row_end) of w, whole tiles, as bf16, `stride` (a multiple of 8) apart.
void decode_rows(Stream stream, const MatrixView& w, int64_t row_begin, int64_t row_end, int64_t stride, uint16_t* out);

bool is_tiled(BlockFormat format);
int64_t tiles_in_row(BlockFormat format, int64_t num_cols);
inline int64_t round_up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Rows [first_row, first_row + num_rows) of w; first_row is a multiple of 8.
MatrixView rows_of(const MatrixView& w, int64_t first_row, int64_t num_rows);

}  // namespace chainfed::cuda

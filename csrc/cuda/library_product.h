// The dense product of the vendor's library (cuBLASLt), found at run time: bf16 times bf16, f32 sums and result. The
// emulated build computes the same with plain loops.
//   forward  out[m, n] (+)= sum over k of x[m, k] w[n, k] + bias[n]      grad  out[m, k] (+)= sum over n of x[m, n]
//   w[n, k]
#pragma once
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/tile_codec.h"

namespace chainfed::cuda {

// With room to start at a multiple of 256, which the library wants.
constexpr int64_t kLibraryWorkspaceBytes = (int64_t{8} << 20) + 256;

struct LibraryCall {
  Direction direction;
  const uint16_t* w;  // bf16 [num_rows, num_cols], rows w_stride apart
  int64_t num_rows, num_cols, w_stride;
  const uint16_t* x;  // bf16, rows x_stride apart
  int64_t num_tokens, x_stride;
  const float* bias;  // forward only, or null
  float* out;         // rows out_stride apart
  int64_t out_stride;
  bool accumulate;
  void* workspace;  // kLibraryWorkspaceBytes, aligned to 64
};

// A handle for library_product on the current device, kept for the life of the process; null when cuBLASLt is not on
// this machine.
void* open_library();
void library_product(void* library, Stream stream, const LibraryCall& call);

}  // namespace chainfed::cuda

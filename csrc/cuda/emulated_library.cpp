#include "cuda/library_product.h"

namespace chainfed::cuda {

void* open_library() {
  static int handle;
  return &handle;
}

void library_product(void*, Stream, const LibraryCall& call) {
  const bool forward = call.direction == Direction::forward;
  const int64_t outputs = forward ? call.num_rows : call.num_cols, summed = forward ? call.num_cols : call.num_rows;
  for (int64_t t = 0; t < call.num_tokens; ++t) {
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = forward && call.bias != nullptr ? call.bias[o] : 0.0;
      for (int64_t i = 0; i < summed; ++i) {
        const int64_t at = forward ? o * call.w_stride + i : i * call.w_stride + o;
        sum += static_cast<double>(bf16_to_float(call.x[t * call.x_stride + i])) * bf16_to_float(call.w[at]);
      }
      float& out = call.out[t * call.out_stride + o];
      out = static_cast<float>(call.accumulate ? out + sum : sum);
    }
  }
}

}  // namespace chainfed::cuda

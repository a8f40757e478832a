#include "boundary/adapter.h"

namespace chainfed {

void apply_adapter_scalar(const BottleneckView& adapter, const float* hidden, int64_t num_tokens, int64_t hidden_size,
                          float* out) {
  const int64_t width = adapter.width;
  float middle[kMaxAdapterWidth];
  for (int64_t t = 0; t < num_tokens; ++t) {
    const float* h = hidden + t * hidden_size;
    for (int64_t r = 0; r < width; ++r) {
      double sum = adapter.down_bias[r];
      for (int64_t d = 0; d < hidden_size; ++d)
        sum += static_cast<double>(adapter.down_weight[r * hidden_size + d]) * h[d];
      middle[r] = gelu(static_cast<float>(sum));
    }
    for (int64_t d = 0; d < hidden_size; ++d) {
      double sum = adapter.up_bias[d];
      for (int64_t r = 0; r < width; ++r) sum += static_cast<double>(adapter.up_weight[d * width + r]) * middle[r];
      out[t * hidden_size + d] = static_cast<float>(h[d] + sum);
    }
  }
}

}  // namespace chainfed

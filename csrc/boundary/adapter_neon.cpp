#include <arm_neon.h>

#include "boundary/adapter_lanes.h"

namespace chainfed {
namespace {

struct Lanes4 {
  using Vector = float32x4_t;
  static constexpr int64_t kCount = 4;
  static Vector zero() { return vdupq_n_f32(0.0f); }
  static Vector load(const float* from) { return vld1q_f32(from); }
  static void store(float* to, Vector value) { vst1q_f32(to, value); }
  static Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
  static Vector multiply_add(float weight, Vector x, Vector sum) { return vfmaq_n_f32(sum, x, weight); }
};

}  // namespace

void apply_adapter_neon(const BottleneckView& adapter, const float* hidden, int64_t num_tokens, int64_t hidden_size,
                        float* out) {
  for (int64_t t = 0; t < num_tokens; t += Lanes4::kCount) {
    apply_adapter_lanes<Lanes4>(adapter, hidden + t * hidden_size, std::min(Lanes4::kCount, num_tokens - t),
                                hidden_size, out + t * hidden_size);
  }
}

}  // namespace chainfed

#include <immintrin.h>

#include "boundary/adapter_lanes.h"

namespace chainfed {
namespace {

struct Lanes8 {
  using Vector = __m256;
  static constexpr int64_t kCount = 8;
  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector load(const float* from) { return _mm256_load_ps(from); }
  static void store(float* to, Vector value) { _mm256_store_ps(to, value); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector multiply_add(float weight, Vector x, Vector sum) {
    return _mm256_fmadd_ps(_mm256_set1_ps(weight), x, sum);
  }
};

}  // namespace

void apply_adapter_avx2(const BottleneckView& adapter, const float* hidden, int64_t num_tokens, int64_t hidden_size,
                        float* out) {
  for (int64_t t = 0; t < num_tokens; t += Lanes8::kCount) {
    apply_adapter_lanes<Lanes8>(adapter, hidden + t * hidden_size, std::min(Lanes8::kCount, num_tokens - t),
                                hidden_size, out + t * hidden_size);
  }
}

}  // namespace chainfed

#include <immintrin.h>

#include "boundary/adapter_lanes.h"

namespace chainfed {
namespace {

struct Lanes16 {
  using Vector = __m512;
  static constexpr int64_t kCount = 16;
  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* from) { return _mm512_load_ps(from); }
  static void store(float* to, Vector value) { _mm512_store_ps(to, value); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector multiply_add(float weight, Vector x, Vector sum) {
    return _mm512_fmadd_ps(_mm512_set1_ps(weight), x, sum);
  }
};
static_assert(Lanes16::kCount == kAdapterTokens, "one call fills the vector");

}  // namespace

void apply_adapter_avx512vnni(const BottleneckView& adapter, const float* hidden, int64_t num_tokens,
                              int64_t hidden_size, float* out) {
  apply_adapter_lanes<Lanes16>(adapter, hidden, num_tokens, hidden_size, out);
}

}  // namespace chainfed

// AVX2: one step of a register tile of 4 tokens x 16 rows (or columns), in assembly. What limits these loops is the
// number of instructions, and the compiler adds to it: left alone it makes all products first and spills them; given
// them one by one it copies sums. Each includer compiles its own copy.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace chainfed {
namespace {

constexpr int kStepTokens = 4;

inline __m256i load_aligned(const void* bytes) { return _mm256_load_si256(static_cast<const __m256i*>(bytes)); }

// Four bytes or two 16-bit integers of a token, as an operand of assembly.
using Four = const int32_t __attribute__((may_alias));
inline Four& four_bytes(const void* bytes) { return *static_cast<Four*>(bytes); }

// Token t: its four bytes broadcast to x; `multiply` (a function of factor, product) makes the products with w0 and w1,
// which are added to the token's two sums.
#define CHAINFED_TOKEN(t, multiply, add)                                                                   \
  "vpbroadcastd %[x" #t "], %[x]\n\t" multiply("%[w0]", "%[product]", "0") add                             \
      " %[product], %[sum" #t "0], %[sum" #t "0]\n\t" multiply("%[w1]", "%[x]", "1") add " %[x], %[sum" #t \
                                                                                         "1], %[sum" #t "1]\n\t"
#define CHAINFED_STEP(multiply, add) \
  CHAINFED_TOKEN(0, multiply, add)   \
  CHAINFED_TOKEN(1, multiply, add) CHAINFED_TOKEN(2, multiply, add) CHAINFED_TOKEN(3, multiply, add)
#define CHAINFED_SUMS(sum)                                                                            \
  [sum00] "+x"(sum[0][0]), [sum01] "+x"(sum[0][1]), [sum10] "+x"(sum[1][0]), [sum11] "+x"(sum[1][1]), \
      [sum20] "+x"(sum[2][0]), [sum21] "+x"(sum[2][1]), [sum30] "+x"(sum[3][0]), [sum31] "+x"(sum[3][1])
// Token t's bytes are at bytes + t * stride.
#define CHAINFED_FOURS(bytes, stride)                                                                                  \
  [x0] "m"(four_bytes(bytes)), [x1] "m"(four_bytes((bytes) + (stride))), [x2] "m"(four_bytes((bytes) + 2 * (stride))), \
      [x3] "m"(four_bytes((bytes) + 3 * (stride)))

#define CHAINFED_PAIR(w, product, half) "vpmaddwd %[x], " w ", " product "\n\t"

// sum[t] (int32) += products of int16 pairs: w0 and w1 (8 x 2 each) with the token's pair.
inline void step_pairs(__m256i (&sum)[kStepTokens][2], __m256i w0, __m256i w1, const uint8_t* bytes, int64_t stride) {
  __m256i x, product;
  __asm__(CHAINFED_STEP(CHAINFED_PAIR, "vpaddd")
          : CHAINFED_SUMS(sum), [x] "=&x"(x), [product] "=&x"(product)
          : [w0] "x"(w0), [w1] "x"(w1), CHAINFED_FOURS(bytes, stride));
}

}  // namespace
}  // namespace chainfed

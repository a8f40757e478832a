// Eight floats at a time, in GCC's and Clang's vector extension; each includer compiles its own copy.
#pragma once
#include <cstdint>
#ifdef __AVX__
#include <immintrin.h>
#endif

namespace chainfed {
namespace {

constexpr int kLanes = 8;

// Elementwise arithmetic and comparisons round once an operation, so the bits are the same at every level. A comparison
// gives -1 or 0 in each lane.
typedef float Lanes __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes), may_alias));

// Vectors travel by reference: passed by value, they would have another ABI in each instruction set. Copy what load()
// returns into Lanes before passing it on, for Lanes& promises alignment.
typedef float UnalignedLanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
static inline const UnalignedLanes& load(const float* values) {
  return *reinterpret_cast<const UnalignedLanes*>(values);
}

#ifdef __AVX__  // GCC makes a comparison and a blend, three instructions' worth, of the same where `other` is constant
static inline void maximise(Lanes& value, const Lanes& other) { value = _mm256_max_ps(other, value); }
static inline void minimise(Lanes& value, const Lanes& other) { value = _mm256_min_ps(other, value); }
#else
static inline void maximise(Lanes& value, const Lanes& other) { value = other > value ? other : value; }
static inline void minimise(Lanes& value, const Lanes& other) { value = other < value ? other : value; }
#endif

// What f16_to_float(float_to_f16(value)) gives for anything but NaN, which becomes an infinity.
static inline void round_to_f16(Lanes& value) {
  const IntLanes bits = reinterpret_cast<const IntLanes&>(value);
  const IntLanes magnitude = bits & 0x7FFFFFFF;
  const Lanes exact = reinterpret_cast<const Lanes&>(magnitude);
  const Lanes subnormal = (exact + 0.5f) - 0.5f;  // the last bit of 0.5 is that of f16's subnormals
  IntLanes rounded = (magnitude + 0xFFF + ((magnitude >> 13) & 1)) & ~0x1FFF;
  rounded = magnitude < 0x38800000 ? reinterpret_cast<const IntLanes&>(subnormal) : rounded;
  rounded = magnitude >= 0x477FF000 ? IntLanes{} + 0x7F800000 : rounded;
  rounded |= bits & ~0x7FFFFFFF;
  value = reinterpret_cast<const Lanes&>(rounded);
}

}  // namespace
}  // namespace chainfed

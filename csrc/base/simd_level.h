// Which instruction set the kernels use. Decided once from CPU and operating system (XCR0: does the OS save the
// registers?) and from the environment variable CHAINFED_SIMD, which can force the level down but never up. Kernels
// look the level up once a call and then run through a table of function pointers.
#pragma once
#include <array>
#include <cstdint>

namespace chainfed {

enum class SimdLevel : uint8_t { scalar, avx2, avx512vnni };
constexpr int kNumSimdLevels = 3;

const char* simd_level_name(SimdLevel level);
SimdLevel parse_simd_level(const char* name);  // throws InvalidArgument naming the three
// The best level of this CPU, OS and build.
SimdLevel supported_simd_level();
// The level in force. The first call reads CHAINFED_SIMD and throws as set_simd_level does.
SimdLevel simd_level();
// Throws UnsupportedHardware when this CPU, OS or build lacks the level.
void set_simd_level(SimdLevel level);
// Back to the best level that CHAINFED_SIMD allows.
void reset_simd_level();

// One entry a level, weakest first. A kernel without its own version for a level repeats the entry below it.
template <typename Function>
using SimdTable = std::array<Function, kNumSimdLevels>;

template <typename Function>
Function select(const SimdTable<Function>& table) {
  return table[static_cast<int>(simd_level())];
}

}  // namespace chainfed

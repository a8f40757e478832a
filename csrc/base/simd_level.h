// Which instruction set the kernels use. Decided once from CPU and operating system (XCR0 or the kernel's HWCAP:
// does the OS save the registers?) and from the environment variable CHAINFED_SIMD, which can force the level down but
// never up. Kernels look the level up once a call and then run through a table of function pointers.
#pragma once
#include <array>
#include <cstdint>
#include <string>

namespace chainfed {

// Weakest first; each level has what the ones before it have. dotprod: SDOT; i8mm: SMMLA.
#if defined(CHAINFED_X86)
enum class SimdLevel : uint8_t { scalar, avx2, avx512vnni };
constexpr int kNumSimdLevels = 3;
#elif defined(CHAINFED_ARM64)
enum class SimdLevel : uint8_t { scalar, neon, dotprod, i8mm };
constexpr int kNumSimdLevels = 4;
#else
enum class SimdLevel : uint8_t { scalar };
constexpr int kNumSimdLevels = 1;
#endif

const char* simd_level_name(SimdLevel level);
std::string simd_level_names();                // all of this architecture, separated by spaces
SimdLevel parse_simd_level(const char* name);  // throws InvalidArgument naming those of this architecture
// The best level of this CPU, OS and build.
SimdLevel supported_simd_level();
// The level in force. The first call reads CHAINFED_SIMD and throws as set_simd_level does.
SimdLevel simd_level();
// Throws UnsupportedHardware when this CPU, OS or build lacks the level.
void set_simd_level(SimdLevel level);
// Back to the best level that CHAINFED_SIMD allows.
void reset_simd_level();

// One entry a level. A kernel without its own version for a level repeats the entry below it.
template <typename Function>
using SimdTable = std::array<Function, kNumSimdLevels>;

// The entries of a SimdTable of this architecture; the names of the other's levels need not exist.
#if defined(CHAINFED_X86)
#define CHAINFED_LEVELS(scalar, avx2, avx512vnni, neon, dotprod, i8mm) {scalar, avx2, avx512vnni}
#elif defined(CHAINFED_ARM64)
#define CHAINFED_LEVELS(scalar, avx2, avx512vnni, neon, dotprod, i8mm) {scalar, neon, dotprod, i8mm}
#else
#define CHAINFED_LEVELS(scalar, avx2, avx512vnni, neon, dotprod, i8mm) {scalar}
#endif

template <typename Function>
Function select(const SimdTable<Function>& table) {
  return table[static_cast<int>(simd_level())];
}

}  // namespace chainfed

#include "base/simd_level.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "chainfed/error.h"

#if defined(CHAINFED_X86)
#include <cpuid.h>
#elif defined(CHAINFED_ARM64)
#include <sys/auxv.h>
#endif

namespace chainfed {
namespace {

constexpr SimdTable<const char*> kNames = CHAINFED_LEVELS("scalar", "avx2", "avx512vnni", "neon", "dotprod", "i8mm");
constexpr int kUndecided = -1;
std::atomic<int> level_in_force{kUndecided};

#if defined(CHAINFED_X86)
uint64_t read_xcr0() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool has_bits(uint64_t value, uint64_t bits) { return (value & bits) == bits; }

SimdLevel detect() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return SimdLevel::scalar;
  // Leaf 1, ecx: FMA 12, OSXSAVE 27, AVX 28, F16C 29. Without OSXSAVE, xgetbv itself is illegal.
  if (!has_bits(c, (1u << 12) | (1u << 27) | (1u << 28) | (1u << 29))) return SimdLevel::scalar;
  const uint64_t xcr0 = read_xcr0();
  if (!has_bits(xcr0, 0x6)) return SimdLevel::scalar;  // xmm and ymm state
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return SimdLevel::scalar;
  if (!has_bits(b, 1u << 5)) return SimdLevel::scalar;  // AVX2
  // Leaf 7, ebx: AVX512F 16, DQ 17, BW 30, VL 31; ecx: VNNI 11. XCR0 5..7: opmask and zmm state.
  const bool avx512 = has_bits(b, (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31)) && has_bits(c, 1u << 11);
  return avx512 && has_bits(xcr0, 0xE6) ? SimdLevel::avx512vnni : SimdLevel::avx2;
}
#elif defined(CHAINFED_ARM64)
SimdLevel detect() {
  // The kernel's bits (asm/hwcap.h, by value: old headers lack the newer names); it clears what it does not support.
  constexpr unsigned long kAsimd = 1ul << 1, kDotprod = 1ul << 20, kI8mm = 1ul << 13;
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  if ((first & kAsimd) == 0) return SimdLevel::scalar;
  if ((first & kDotprod) == 0) return SimdLevel::neon;
  return (second & kI8mm) != 0 ? SimdLevel::i8mm : SimdLevel::dotprod;
}
#else
SimdLevel detect() { return SimdLevel::scalar; }
#endif

void require_supported(SimdLevel level, const char* origin) {
  const SimdLevel best = supported_simd_level();
  if (level > best) {
    throw UnsupportedHardware(std::string(origin) + " asks for SIMD level " + simd_level_name(level) +
                              ", but this CPU, system and build support at most " + simd_level_name(best));
  }
}

SimdLevel default_level() {
  const char* wish = std::getenv("CHAINFED_SIMD");
  if (wish == nullptr || *wish == '\0') return supported_simd_level();
  const SimdLevel level = parse_simd_level(wish);
  require_supported(level, "CHAINFED_SIMD");
  return level;
}

}  // namespace

const char* simd_level_name(SimdLevel level) { return kNames[static_cast<int>(level)]; }

std::string simd_level_names() {
  std::string all = kNames[0];
  for (int i = 1; i < kNumSimdLevels; ++i) all += std::string(" ") + kNames[i];
  return all;
}

SimdLevel parse_simd_level(const char* name) {
  for (int i = 0; i < kNumSimdLevels; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return static_cast<SimdLevel>(i);
  }
  throw InvalidArgument("SIMD level must be one of " + simd_level_names() + ", got " + name);
}

SimdLevel supported_simd_level() {
  static const SimdLevel level = detect();
  return level;
}

SimdLevel simd_level() {
  int level = level_in_force.load(std::memory_order_relaxed);
  if (level == kUndecided) {
    level = static_cast<int>(default_level());
    level_in_force.store(level, std::memory_order_relaxed);
  }
  return static_cast<SimdLevel>(level);
}

void set_simd_level(SimdLevel level) {
  require_supported(level, "set_simd_level");
  level_in_force.store(static_cast<int>(level), std::memory_order_relaxed);
}

void reset_simd_level() { level_in_force.store(static_cast<int>(default_level()), std::memory_order_relaxed); }

}  // namespace chainfed

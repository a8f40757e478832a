// What this machine can do at best, measured: `peak [scalar|avx2|avx512vnni|neon|dotprod|i8mm] [threads]` prints one
// JSON object.
//   f32_gflops   multiply-adds of f32 in registers, two operations each
//   int8_gops    u8 x s8 (on Arm s8 x s8) products added up in registers by the instructions of the level, two
//                operations each; AVX2: maddubs and one add of int16, the least that any kernel needs
//   copy_gb_s    bytes read plus written by memcpy of 64 MiB a thread
// All threads run together; the figure is the sum over them of the best of five runs, by the CPU time of each.
#include <time.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr int64_t kRounds = 20'000'000;
using Loop = double (*)();  // does its work once, returns the number of operations

double scalar_loop() {
  volatile float sink = 0;
  float sum[8] = {};
  for (int64_t i = 0; i < kRounds / 8; ++i) {
    for (float& s : sum) s = s * 0.999f + 1.0f;
  }
  for (float s : sum) sink = sink + s;
  return 2.0 * kRounds;
}

// Twelve independent sums: latency times ports of every current core.
#define CHAINFED_TWELVE(step) \
  step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7) step(8) step(9) step(10) step(11)

#if defined(__x86_64__)
#define CHAINFED_STEP(i) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+x"(sum[i]) : "x"(one));
__attribute__((target("avx2,fma"))) double f32_avx2() {
  __m256 sum[12] = {}, one = _mm256_set1_ps(1.0f);
  for (int64_t i = 0; i < kRounds / 12; ++i) {
    CHAINFED_TWELVE(CHAINFED_STEP)
  }
  return 16.0 * (kRounds / 12 * 12);
}
#undef CHAINFED_STEP
#define CHAINFED_STEP(i) \
  __asm__ volatile("vpmaddubsw %2, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum[i]), "=&x"(product) : "x"(one));
__attribute__((target("avx2"))) double int8_avx2() {
  __m256i sum[12] = {}, one = _mm256_set1_epi8(1), product;
  for (int64_t i = 0; i < kRounds / 12; ++i) {
    CHAINFED_TWELVE(CHAINFED_STEP)
  }
  return 64.0 * (kRounds / 12 * 12);
}
#undef CHAINFED_STEP
#define CHAINFED_STEP(i) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+v"(sum[i]) : "v"(one));
__attribute__((target("avx512f"))) double f32_avx512() {
  __m512 sum[12] = {}, one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < kRounds / 12; ++i) {
    CHAINFED_TWELVE(CHAINFED_STEP)
  }
  return 32.0 * (kRounds / 12 * 12);
}
#undef CHAINFED_STEP
#define CHAINFED_STEP(i) __asm__ volatile("vpdpbusd %1, %1, %0" : "+v"(sum[i]) : "v"(one));
__attribute__((target("avx512f,avx512vnni"))) double int8_avx512() {
  __m512i sum[12] = {}, one = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < kRounds / 12; ++i) {
    CHAINFED_TWELVE(CHAINFED_STEP)
  }
  return 128.0 * (kRounds / 12 * 12);
}
#undef CHAINFED_STEP
#elif defined(__aarch64__)
#define CHAINFED_STEP(i) __asm__ volatile("fmla %0.4s, %1.4s, %1.4s" : "+w"(sum[i]) : "w"(one));
double f32_neon() {
  float32x4_t sum[12] = {}, one = vdupq_n_f32(1.0f);
  for (int64_t i = 0; i < kRounds / 12; ++i) {
    CHAINFED_TWELVE(CHAINFED_STEP)
  }
  return 8.0 * (kRounds / 12 * 12);
}
#undef CHAINFED_STEP
#define CHAINFED_STEP(i) \
  __asm__ volatile("smull %1.8h, %2.8b, %2.8b\n\tsadalp %0.4s, %1.8h" : "+w"(sum[i]), "=&w"(product) : "w"(one));
double int8_neon() {
  int32x4_t sum[12] = {}, product;
  int8x16_t one = vdupq_n_s8(1);
  for (int64_t i = 0; i < kRounds / 12; ++i) {
    CHAINFED_TWELVE(CHAINFED_STEP)
  }
  return 16.0 * (kRounds / 12 * 12);
}
#undef CHAINFED_STEP
#define CHAINFED_STEP(i) __asm__ volatile("sdot %0.4s, %1.16b, %1.16b" : "+w"(sum[i]) : "w"(one));
__attribute__((target("arch=armv8.2-a+dotprod"))) double int8_dotprod() {
  int32x4_t sum[12] = {};
  int8x16_t one = vdupq_n_s8(1);
  for (int64_t i = 0; i < kRounds / 12; ++i) {
    CHAINFED_TWELVE(CHAINFED_STEP)
  }
  return 32.0 * (kRounds / 12 * 12);
}
#undef CHAINFED_STEP
#define CHAINFED_STEP(i) __asm__ volatile("smmla %0.4s, %1.16b, %1.16b" : "+w"(sum[i]) : "w"(one));
__attribute__((target("arch=armv8.2-a+i8mm"))) double int8_i8mm() {
  int32x4_t sum[12] = {};
  int8x16_t one = vdupq_n_s8(1);
  for (int64_t i = 0; i < kRounds / 12; ++i) {
    CHAINFED_TWELVE(CHAINFED_STEP)
  }
  return 64.0 * (kRounds / 12 * 12);
}
#undef CHAINFED_STEP
#endif

double copy_loop() {
  constexpr int64_t kBytes = 64 << 20;
  static thread_local std::vector<char> source(kBytes, 1), target(kBytes, 2);
  std::memcpy(target.data(), source.data(), kBytes);
  __asm__ volatile("" : : "r"(target.data()) : "memory");
  return 2.0 * kBytes;
}

struct Level {
  const char* name;
  Loop f32, int8;
};
constexpr Level kLevels[] = {
#if defined(__x86_64__)
    {"avx512vnni", f32_avx512, int8_avx512},
    {"avx2", f32_avx2, int8_avx2},
#elif defined(__aarch64__)
    {"i8mm", f32_neon, int8_i8mm},
    {"dotprod", f32_neon, int8_dotprod},
    {"neon", f32_neon, int8_neon},
#endif
    {"scalar", scalar_loop, scalar_loop},
};

// Of this thread: what other processes take away does not count.
double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

double best_giga_per_second(Loop loop, int num_threads) {
  std::vector<double> best(num_threads, 0.0);
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t) {
    threads.emplace_back([&best, loop, t] {
      for (int run = 0; run < 5; ++run) {
        const double begin = cpu_seconds(), operations = loop(), rate = operations / (cpu_seconds() - begin);
        if (rate > best[t]) best[t] = rate;
      }
    });
  }
  double sum = 0;
  for (int t = 0; t < num_threads; ++t) {
    threads[t].join();
    sum += best[t];
  }
  return sum * 1e-9;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "scalar";
  const int num_threads = argc > 2 ? std::atoi(argv[2]) : 1;
  for (const Level& level : kLevels) {
    if (wanted != level.name || num_threads < 1) continue;
    std::printf("{\"f32_gflops\": %.1f, \"int8_gops\": %.1f, \"copy_gb_s\": %.1f}\n",
                best_giga_per_second(level.f32, num_threads), best_giga_per_second(level.int8, num_threads),
                best_giga_per_second(copy_loop, num_threads));
    return 0;
  }
  std::fprintf(stderr, "usage: peak LEVEL THREADS, with a level that this build has, got %s\n", wanted.c_str());
  return 2;
}

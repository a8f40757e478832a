// The functions of device.h on a CPU. A block's threads are fibers of one host thread; each runs until it waits for
// others, in an order that `set_schedule` turns round, so that a missing barrier shows as a wrong result. Asynchronous
// copies happen only when they are waited for. Shared memory starts filled with NaN patterns. Not thread-safe.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define CHAINFED_DEVICE inline
#define CHAINFED_UNROLL

namespace chainfed::cuda {

namespace emulator {
// What the running fiber sees.
struct Position {
  int thread = 0, num_threads = 0;
  int64_t block[3] = {0, 0, 0};
};
extern Position position;

// Runs body(shared) for every thread of every block. Throws chainfed::Error when threads wait for one another for ever.
void run_grid(Grid grid, int num_threads, int64_t shared_bytes, const std::function<void(unsigned char*)>& body);
enum class Schedule { ascending, descending, shuffled };
void set_schedule(Schedule schedule);

void wait_for_block();
// Deposits this lane's `bytes` of data and returns once all 32 lanes have; the last one in calls combine(all lanes'
// data, 64 bytes apart) before anybody goes on. `data` is then replaced by this lane's part.
void exchange(void* data, int bytes, void (*combine)(unsigned char* lanes, int argument), int argument = 0);
void copy_later(void* to, const void* from, bool valid);
void commit_copies();
void wait_for_copies(int pending);
}  // namespace emulator

inline int thread_index() { return emulator::position.thread; }
inline int num_threads() { return emulator::position.num_threads; }
inline int64_t block_x() { return emulator::position.block[0]; }
inline int64_t block_y() { return emulator::position.block[1]; }
inline int64_t block_z() { return emulator::position.block[2]; }
inline void sync_threads() { emulator::wait_for_block(); }
void sync_warp();
float warp_xor(float value, int mask);
uint32_t warp_max(uint32_t value);
uint32_t warp_min(uint32_t value);
inline void copy_async16(void* shared, const void* global, bool valid) { emulator::copy_later(shared, global, valid); }
inline void copy_async_commit() { emulator::commit_copies(); }
template <int kPending>
inline void copy_async_wait() {
  emulator::wait_for_copies(kPending);
}
void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

inline uint16_t half_bits(float value) { return float_to_f16(value); }
inline float half_value(uint16_t bits) { return f16_to_float(bits); }
inline uint32_t bf16_pair(float low, float high) {
  return static_cast<uint32_t>(float_to_bf16(high)) << 16 | float_to_bf16(low);
}
uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c);
uint32_t half2_mul(uint32_t a, uint32_t b);
uint32_t half2_add(uint32_t a, uint32_t b);
inline uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  }
  return result;
}
inline uint32_t mask_or(uint32_t value, uint32_t mask, uint32_t bits) { return (value & mask) | bits; }
inline float exact_mul(float a, float b) { return a * b; }
inline float round_even(float value) { return std::nearbyint(value); }
inline float exponential(float value) { return std::exp(value); }
inline float logarithm(float value) { return std::log(value); }
inline float complementary_erf(float value) { return std::erfc(value); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

}  // namespace chainfed::cuda

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "chainfed/error.h"
#include "cuda/device.h"

namespace chainfed::cuda {
namespace emulator {

Position position;

namespace {

constexpr int kStackBytes = 64 << 10;
constexpr int kLaneBytes = 64;

struct PendingCopy {
  void* to;
  const void* from;
  bool valid;
};

// Contexts start a fiber; after that it and the scheduler jump to one another, which needs no system call. The
// sanitizers follow contexts alone.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kJump = false;
#else
constexpr bool kJump = true;
#endif

struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
  const int* waits_for = nullptr;  // a generation counter; the fiber goes on when it differs from `seen`
  int seen = 0;
  std::vector<std::vector<PendingCopy>> groups;  // committed, oldest first
  std::vector<PendingCopy> open;
};

struct Warp {
  int arrived = 0, generation = 0;
  alignas(64) unsigned char lanes[kWarp * kLaneBytes];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int arrived = 0, generation = 0, finished = 0, current = 0;
  ucontext_t scheduler;
  jmp_buf scheduler_place;
  const std::function<void(unsigned char*)>* body = nullptr;
  unsigned char* shared = nullptr;
  std::string failure;
};

Block* running = nullptr;
Schedule schedule = Schedule::ascending;
std::mt19937 random_order(1);

void go_to_scheduler(Fiber& fiber) {
  if (!kJump) {
    swapcontext(&fiber.context, &running->scheduler);
  } else if (_setjmp(fiber.place) == 0) {
    _longjmp(running->scheduler_place, 1);
  }
}

void go_to_fiber(Block& block, Fiber& fiber) {
  if (!kJump) {
    swapcontext(&block.scheduler, &fiber.context);
  } else if (_setjmp(block.scheduler_place) == 0) {
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }
}

void yield_until_changed(const int* counter) {
  Fiber& fiber = running->fibers[running->current];
  fiber.waits_for = counter;
  fiber.seen = *counter;
  go_to_scheduler(fiber);
}

void start_fiber() {
  try {
    (*running->body)(running->shared);
  } catch (const std::exception& error) {  // an exception cannot leave a fiber
    running->failure = error.what();
  }
  Fiber& fiber = running->fibers[running->current];
  fiber.done = true;
  ++running->finished;
  go_to_scheduler(fiber);
}

void prepare(Fiber& fiber) {
  fiber.done = fiber.started = false;
  fiber.waits_for = nullptr;
  fiber.groups.clear();
  fiber.open.clear();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, start_fiber, 0);
}

// Lets every fiber that can go on run until it waits or ends. False: none could.
bool turn(Block& block, std::vector<int>& order) {
  bool progressed = false;
  if (schedule == Schedule::shuffled) std::shuffle(order.begin(), order.end(), random_order);
  for (int index : order) {
    Fiber& fiber = block.fibers[index];
    if (fiber.done || (fiber.waits_for != nullptr && *fiber.waits_for == fiber.seen)) continue;
    fiber.waits_for = nullptr;
    block.current = position.thread = index;
    progressed = true;
    go_to_fiber(block, fiber);
    if (!block.failure.empty()) throw Error(block.failure);
  }
  return progressed;
}

void run_block(Block& block, std::vector<int>& order) {
  block.arrived = block.finished = 0;
  for (Warp& warp : block.warps) warp.arrived = 0;
  for (Fiber& fiber : block.fibers) prepare(fiber);
  while (block.finished < static_cast<int>(block.fibers.size())) {
    if (!turn(block, order)) throw Error("emulated kernel: threads wait for one another for ever (divergent barrier)");
  }
}

}  // namespace

void set_schedule(Schedule chosen) { schedule = chosen; }

void run_grid(Grid grid, int num_threads, int64_t shared_bytes, const std::function<void(unsigned char*)>& body) {
  if (num_threads % kWarp != 0) throw Error("emulated kernel: a block must be whole warps");
  Block block;
  block.fibers = std::vector<Fiber>(num_threads);
  block.warps = std::vector<Warp>(num_threads / kWarp);
  block.body = &body;
  std::vector<unsigned char> memory(shared_bytes + 128);
  block.shared = memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128) % 128;
  std::vector<int> order(num_threads);
  for (int i = 0; i < num_threads; ++i) order[i] = schedule == Schedule::descending ? num_threads - 1 - i : i;
  position.num_threads = num_threads;
  running = &block;
  for (int64_t z = 0; z < grid.z; ++z) {
    for (int64_t y = 0; y < grid.y; ++y) {
      for (int64_t x = 0; x < grid.x; ++x) {
        position.block[0] = x, position.block[1] = y, position.block[2] = z;
        std::fill(memory.begin(), memory.end(), 0xFF);
        run_block(block, order);
      }
    }
  }
  running = nullptr;
}

void wait_for_block() {
  Block& block = *running;
  if (++block.arrived == static_cast<int>(block.fibers.size())) {
    block.arrived = 0;
    ++block.generation;
    return;
  }
  yield_until_changed(&block.generation);
}

void exchange(void* data, int bytes, void (*combine)(unsigned char*, int), int argument) {
  Warp& warp = running->warps[position.thread / kWarp];
  const int lane = position.thread % kWarp;
  unsigned char* slot = warp.lanes + lane * kLaneBytes;
  std::memcpy(slot, data, static_cast<size_t>(bytes));
  if (++warp.arrived == kWarp) {
    combine(warp.lanes, argument);
    warp.arrived = 0;
    ++warp.generation;
  } else {
    yield_until_changed(&warp.generation);
  }
  // Nobody can deposit the next exchange's data before this lane has read: that needs this lane's own arrival, except
  // in this very slot, which only this lane writes.
  std::memcpy(data, slot, static_cast<size_t>(bytes));
}

void copy_later(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(from) % 16 != 0)) {
    throw Error("emulated kernel: copy_async16 needs addresses at multiples of 16");
  }
  running->fibers[running->current].open.push_back({to, from, valid});
}

void commit_copies() {
  Fiber& fiber = running->fibers[running->current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void wait_for_copies(int pending) {
  auto& groups = running->fibers[running->current].groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const PendingCopy& copy : groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
    }
    groups.erase(groups.begin());
  }
}

}  // namespace emulator

namespace {

using emulator::exchange;

template <typename T>
T lane_value(const unsigned char* lanes, int lane) {
  T value;
  std::memcpy(&value, lanes + lane * 64, sizeof value);
  return value;
}

template <typename T>
void set_lane(unsigned char* lanes, int lane, T value) {
  std::memcpy(lanes + lane * 64, &value, sizeof value);
}

struct MmaLane {
  float d[4];
  uint32_t a[4], b[2];
};
static_assert(sizeof(MmaLane) <= 64);

float half_of(uint32_t pair, int index) { return f16_to_float(static_cast<uint16_t>(pair >> 16 * index)); }

// The fragment layouts of mma.m16n8k16 for f16 (PTX manual, "Matrix Fragments for mma.m16n8k16 with floating point").
void multiply(unsigned char* lanes, int) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto mine = lane_value<MmaLane>(lanes, lane);
    const int group = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = (i % 4 < 2) ? group : group + 8, col = t * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      a[row][col] = half_of(mine.a[i / 2], i & 1);
    }
    for (int i = 0; i < 4; ++i) b[t * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = half_of(mine.b[i / 2], i & 1);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    auto mine = lane_value<MmaLane>(lanes, lane);
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? lane / 4 : lane / 4 + 8, col = lane % 4 * 2 + (i & 1);
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][col];
      mine.d[i] += sum;
    }
    set_lane(lanes, lane, mine);
  }
}

template <typename Choose>
void reduce(unsigned char* lanes, Choose choose) {
  auto best = lane_value<uint32_t>(lanes, 0);
  for (int lane = 1; lane < kWarp; ++lane) best = choose(best, lane_value<uint32_t>(lanes, lane));
  for (int lane = 0; lane < kWarp; ++lane) set_lane(lanes, lane, best);
}

// Halves are combined in double, where products and sums of two are exact, and rounded once.
template <typename Combine>
uint32_t each_half(uint32_t a, uint32_t b, uint32_t c, Combine combine) {
  uint32_t result = 0;
  for (int i = 0; i < 2; ++i) {
    const double value = combine(half_of(a, i), half_of(b, i), half_of(c, i));
    result |= static_cast<uint32_t>(float_to_f16(static_cast<float>(value))) << 16 * i;
  }
  return result;
}

}  // namespace

void sync_warp() {
  uint32_t nothing = 0;
  exchange(&nothing, sizeof nothing, [](unsigned char*, int) {});
}

float warp_xor(float value, int mask) {
  exchange(
      &value, sizeof value,
      [](unsigned char* lanes, int with) {
        float values[kWarp];
        for (int lane = 0; lane < kWarp; ++lane) values[lane] = lane_value<float>(lanes, lane);
        for (int lane = 0; lane < kWarp; ++lane) set_lane(lanes, lane, values[lane ^ with]);
      },
      mask);
  return value;
}

uint32_t warp_max(uint32_t value) {
  exchange(&value, sizeof value,
           [](unsigned char* lanes, int) { reduce(lanes, [](uint32_t a, uint32_t b) { return a > b ? a : b; }); });
  return value;
}

uint32_t warp_min(uint32_t value) {
  exchange(&value, sizeof value,
           [](unsigned char* lanes, int) { reduce(lanes, [](uint32_t a, uint32_t b) { return a < b ? a : b; }); });
  return value;
}

void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaLane lane;
  std::memcpy(lane.d, d, sizeof lane.d);
  std::memcpy(lane.a, a, sizeof lane.a);
  std::memcpy(lane.b, b, sizeof lane.b);
  exchange(&lane, sizeof lane, multiply);
  std::memcpy(d, lane.d, sizeof lane.d);
}

uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  return each_half(a, b, c, [](double x, double y, double z) { return x * y + z; });
}
uint32_t half2_mul(uint32_t a, uint32_t b) {
  return each_half(a, b, 0, [](double x, double y, double) { return x * y; });
}
uint32_t half2_add(uint32_t a, uint32_t b) {
  return each_half(a, b, 0, [](double x, double y, double) { return x + y; });
}

}  // namespace chainfed::cuda

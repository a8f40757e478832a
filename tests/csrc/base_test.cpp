// SIMD level, thread pool, half precision, workspace.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <thread>
#include <vector>

#include "base/half.h"
#include "base/simd_level.h"
#include "base/thread_pool.h"
#include "base/workspace.h"
#include "chainfed/error.h"
#include "check.h"

using namespace chainfed;

TEST(every_index_is_visited_once_at_any_thread_count) {
  for (int threads : {1, 2, 3, 5}) {
    set_num_threads(threads);
    for (int64_t count : {0, 1, 2, 3, 7, 64, 1001}) {
      std::vector<int> visits(count, 0);
      parallel_for(count, [&](int64_t index) { ++visits[index]; });
      for (int visit : visits) CHECK(visit == 1);
    }
  }
  set_num_threads(2);
}

TEST(a_thread_that_is_late_does_not_hold_up_the_others) {
  set_num_threads(2);
  std::atomic<int> first{-1};
  std::atomic<int> others{0};
  parallel_ranges(16, [&](int64_t, int64_t, int thread) {
    int nobody = -1;
    if (first.compare_exchange_strong(nobody, thread)) {
      std::this_thread::sleep_for(std::chrono::milliseconds(200));  // meanwhile the other thread takes the rest
    } else if (thread != first) {
      ++others;
    }
  });
  CHECK(others == 15);
}

// A worker that is late for one job must not run a piece of it with the next job's function or count.
TEST(many_short_jobs_do_not_run_into_each_other) {
  for (int threads : {2, 3, 8}) {
    set_num_threads(threads);
    for (int64_t job = 0; job < 3000; ++job) {
      const int64_t count = 2 + job % 40;
      std::atomic<int64_t> sum{0};
      if (job % 2 == 0) {
        parallel_for(count, [&](int64_t index) { sum += index; });
        CHECK(sum == count * (count - 1) / 2);
      } else {
        parallel_ranges(count, [&](int64_t begin, int64_t end, int) { sum += 1000 * (end - begin); });
        CHECK(sum == 1000 * count);
      }
    }
  }
  set_num_threads(2);
}

// A worker that wakes for a job while the pool ends must see the end, or whoever joins it waits for ever.
TEST(a_pool_that_ends_right_after_a_job_leaves_no_worker_waiting) {
  for (int repeat = 0; repeat < 2000; ++repeat) {
    set_num_threads(2 + repeat % 4);
    std::atomic<int> total{0};
    parallel_for(2, [&](int64_t) { ++total; });
    CHECK(total == 2);
  }
  set_num_threads(2);
}

TEST(an_exception_of_a_body_reaches_the_caller_and_the_pool_lives_on) {
  set_num_threads(3);
  for (int64_t bad = 0; bad < 6; ++bad) {
    CHECK_THROWS(std::runtime_error, parallel_for(6, [&](int64_t index) {
                   if (index == bad) throw std::runtime_error("boom");
                 }));
  }
  std::atomic<int> sum{0};
  parallel_for(10, [&](int64_t index) { sum += static_cast<int>(index); });
  CHECK(sum == 45);
  set_num_threads(2);
}

TEST(a_nested_call_runs_on_its_own_thread) {
  std::atomic<int> total{0};
  parallel_for(8, [&](int64_t) {
    const auto outer = std::this_thread::get_id();
    parallel_for(8, [&](int64_t) {
      if (std::this_thread::get_id() == outer) ++total;
    });
  });
  CHECK(total == 64);
}

TEST(calls_from_several_threads_take_turns) {
  std::atomic<int> total{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 200; ++repeat) parallel_for(4, [&](int64_t) { ++total; });
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(total == 4 * 200 * 4);
}

#if !defined(__SANITIZE_THREAD__)  // the thread sanitizer does not follow threads started after fork
TEST(a_forked_child_starts_its_own_threads) {
  set_num_threads(2);
  parallel_for(2, [](int64_t) {});
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    std::atomic<int> total{0};
    parallel_for(100, [&](int64_t) { ++total; });
    _exit(total == 100 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  parallel_for(2, [](int64_t) {});
}
#endif

TEST(thread_count_out_of_range_is_refused) {
  CHECK_THROWS(InvalidArgument, set_num_threads(0));
  CHECK_THROWS(InvalidArgument, set_num_threads(100000));
}

TEST(the_environment_forces_the_level_down_and_never_up) {
  setenv("CHAINFED_SIMD", "scalar", 1);
  reset_simd_level();
  CHECK(simd_level() == SimdLevel::scalar);
  setenv("CHAINFED_SIMD", "sse9", 1);
  CHECK_THROWS(InvalidArgument, reset_simd_level());
  unsetenv("CHAINFED_SIMD");
  reset_simd_level();
  CHECK(simd_level() == supported_simd_level());
  const auto best = static_cast<SimdLevel>(kNumSimdLevels - 1);
  if (supported_simd_level() != best) CHECK_THROWS(UnsupportedHardware, set_simd_level(best));
}

// For runs on machines and emulators whose CPU is known: what is found there is what it has.
TEST(the_level_found_is_the_one_expected) {
  const char* expected = std::getenv("CHAINFED_EXPECTED_SIMD");
  if (expected == nullptr) return;
  CHECK_IN(std::strcmp(simd_level_name(supported_simd_level()), expected) == 0, "found %s, expected %s",
           simd_level_name(supported_simd_level()), expected);
}

TEST(half_conversions_round_trip_and_round_to_nearest_even) {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float from_f16 = f16_to_float(half), from_bf16 = bf16_to_float(half);
    if (!std::isnan(from_f16)) CHECK(float_to_f16(from_f16) == half);
    if (!std::isnan(from_bf16)) CHECK(float_to_bf16(from_bf16) == half);
  }
  CHECK(float_to_f16(1.0f + 1.0f / 2048) == 0x3C00);  // a tie goes to the even neighbour
  CHECK(float_to_f16(1.0f + 3.0f / 2048) == 0x3C02);
  CHECK(float_to_f16(65519.0f) == 0x7BFF && float_to_f16(65520.0f) == 0x7C00);
  CHECK(float_to_f16(2.98e-8f) == 0x0000 && float_to_f16(2.99e-8f) == 0x0001);
  CHECK(std::isnan(f16_to_float(float_to_f16(NAN))) && std::isnan(bf16_to_float(float_to_bf16(NAN))));
}

TEST(a_workspace_is_measured_by_the_code_that_carves_it) {
  alignas(64) char memory[512];
  Workspace measured(nullptr), real(memory);
  CHECK(measured.take<float>(3) == nullptr && measured.take<char>(65) == nullptr);
  CHECK(real.take<float>(3) == reinterpret_cast<float*>(memory));
  CHECK(real.take<char>(65) == memory + 64);
  CHECK(real.used_bytes() == 192 && measured.used_bytes() == 192);
  CHECK_THROWS(InvalidArgument, measured.take<double>(std::numeric_limits<int64_t>::max()));
}

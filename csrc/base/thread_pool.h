// The core's own threads. One pool a process; the calling thread takes part, so `num_threads` counts it. A call's work
// is cut into equal ranges of neighbouring indices, and whoever is free takes the next one: which thread runs which
// index is not fixed, so a body's result must not depend on it. (A fixed split halves the speed whenever something
// else, such as another library's waiting threads, holds one of the cores.) Calls from several Python threads take
// turns; a call from inside a body runs on the calling thread alone. All ranges run even if one throws; the exception
// of the lowest is rethrown by the call. After fork() the child starts its own threads at the first call.
#pragma once
#include <cstdint>
#include <type_traits>

namespace chainfed {

int num_threads();
// Default: the CPUs this process may run on. Throws InvalidArgument outside 1..256.
void set_num_threads(int count);

namespace detail {
using RangeBody = void (*)(void* context, int64_t begin, int64_t end, int thread);
void run_ranges(int64_t count, RangeBody body, void* context);
}  // namespace detail

// body(begin, end, thread) for ranges that make up [0, count); thread in [0, num_threads) names scratch space.
template <typename Body>
void parallel_ranges(int64_t count, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  auto call = [](void* context, int64_t begin, int64_t end, int thread) {
    (*static_cast<Plain*>(context))(begin, end, thread);
  };
  detail::run_ranges(count, call, const_cast<void*>(static_cast<const void*>(&body)));
}

// body(index) for every index of [0, count).
template <typename Body>
void parallel_for(int64_t count, Body&& body) {
  parallel_ranges(count, [&body](int64_t begin, int64_t end, int) {
    for (int64_t index = begin; index < end; ++index) body(index);
  });
}

}  // namespace chainfed

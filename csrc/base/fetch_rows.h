// Asks for rows that a kernel is about to write: they lie a page or more apart, which no prefetcher of a processor
// follows, and a product has nothing else to do when it comes to store its sums.
#pragma once
#include <cstdint>

namespace chainfed {

inline void fetch_rows(const float* first, int64_t row_stride, int64_t num_rows, int64_t width) {
  constexpr int64_t kLineFloats = 16;
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t i = 0; i < width; i += kLineFloats) __builtin_prefetch(first + row * row_stride + i, 1);
  }
}

}  // namespace chainfed

#include "gemm/f32_gemm.h"

namespace chainfed {
namespace {

constexpr int64_t kRows = 4, kCols = 16;

void pack(const float* a, int64_t row_stride, int64_t num_rows, int64_t depth, float* packed) {
  for (int64_t q = 0; q < depth; ++q) {
    for (int64_t i = 0; i < kRows; ++i) packed[q * kRows + i] = i < num_rows ? a[i * row_stride + q] : 0.0f;
  }
}

void multiply(const float* packed, const float* panel, int64_t depth, int64_t num_rows, const float* start, float* c,
              int64_t row_stride) {
  float sum[kRows][kCols] = {};
  for (int64_t q = 0; q < depth; ++q) {
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t p = 0; p < kCols; ++p) sum[i][p] += packed[q * kRows + i] * panel[q * kCols + p];
    }
  }
  for (int64_t i = 0; i < num_rows; ++i) {
    for (int64_t p = 0; p < kCols; ++p) {
      float& target = c[i * row_stride + p];
      target = (start != nullptr ? start[p] : target) + sum[i][p];
    }
  }
}

}  // namespace

const F32Kernels kF32KernelsScalar = {kRows, kCols, &pack, &multiply};

}  // namespace chainfed

// Random matrices in every block format and float64 oracles over them, for the kernel tests.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "base/half.h"
#include "base/simd_level.h"
#include "chainfed/kernels.h"
#include "quant/nf4_table.h"
#include "quant/tile.h"

namespace testing {

using namespace chainfed;

constexpr int64_t kOddSizes[] = {1, 2, 3, 5, 7, 15, 17, 31, 32, 33, 63, 64, 65, 127, 129};
constexpr int kNumOddSizes = 15;
constexpr BlockFormat kFormats[] = {BlockFormat::int4, BlockFormat::nf4, BlockFormat::int8, BlockFormat::bf16,
                                    BlockFormat::f32};

inline std::vector<SimdLevel> levels() {
  std::vector<SimdLevel> all;
  for (int i = 0; i <= static_cast<int>(supported_simd_level()); ++i) all.push_back(static_cast<SimdLevel>(i));
  return all;
}

inline std::vector<float> normal(int64_t count, uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> values(count);
  for (float& value : values) value = distribution(engine);
  return values;
}

// Exactly `bytes` bytes at 64-byte alignment, followed by a guard that must keep its pattern.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : bytes_(bytes), memory_(bytes + 128, 0xA5) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    begin_ = memory_.data() + (64 - address % 64) % 64;
  }
  Buffer(const Buffer&) = delete;
  template <typename T = void>
  T* as() {
    return reinterpret_cast<T*>(begin_);
  }
  bool guard_intact() const {
    for (const uint8_t* byte = begin_ + bytes_; byte < memory_.data() + memory_.size(); ++byte) {
      if (*byte != 0xA5) return false;
    }
    return true;
  }

 private:
  int64_t bytes_;
  std::vector<uint8_t> memory_;
  uint8_t* begin_;
};

struct Quantised {
  Quantised(BlockFormat format, int64_t num_rows, int64_t num_cols)
      : codes(codes_bytes(format, num_rows, num_cols)),
        scales(scales_bytes(format, num_rows, num_cols)),
        view{format, num_rows, num_cols, codes.as<void>(), scales.as<void>()} {}
  Buffer codes, scales;
  MatrixView view;
};

inline std::unique_ptr<Quantised> quantised(BlockFormat format, int64_t num_rows, int64_t num_cols,
                                            const std::vector<float>& weight) {
  auto matrix = std::make_unique<Quantised>(format, num_rows, num_cols);
  quantize_blocks(weight.data(), num_rows, num_cols, format, matrix->codes.as<void>(), matrix->scales.as<void>());
  return matrix;
}

inline std::unique_ptr<Quantised> random_matrix(BlockFormat format, int64_t num_rows, int64_t num_cols) {
  return quantised(format, num_rows, num_cols, normal(num_rows * num_cols, 7));
}

// Straight from the layout text of block_format.h.
inline double decoded(const MatrixView& w, int64_t row, int64_t col) {
  if (w.format == BlockFormat::f32) return static_cast<const float*>(w.codes)[row * w.num_cols + col];
  if (w.format == BlockFormat::bf16) {
    return bf16_to_float(static_cast<const uint16_t*>(w.codes)[row * w.num_cols + col]);
  }
  const int64_t tiles = padded_cols(w.format, w.num_cols) / 32, tile = row / 8 * tiles + col / 32;
  const int64_t r = row % 8, c = col % 32;
  const auto* halves = static_cast<const uint16_t*>(w.scales);
  if (w.format == BlockFormat::int8) {
    const auto code = static_cast<const int8_t*>(w.codes)[tile * 256 + c / 4 * 32 + r * 4 + c % 4];
    return static_cast<double>(f16_to_float(halves[tile * 8 + r])) * code;
  }
  const uint8_t byte = static_cast<const uint8_t*>(w.codes)[tile * 128 + c % 16 / 4 * 32 + r * 4 + c % 4];
  const int code = c < 16 ? byte & 15 : byte >> 4;
  if (w.format == BlockFormat::nf4) {
    return static_cast<double>(static_cast<const float*>(w.scales)[tile / 2 * 8 + r]) * kNf4Table[code];
  }
  return static_cast<double>(f16_to_float(halves[tile * 16 + r])) * code + f16_to_float(halves[tile * 16 + 8 + r]);
}

inline std::vector<double> decoded_all(const MatrixView& w) {
  std::vector<double> values(w.num_rows * w.num_cols);
  for (int64_t row = 0; row < w.num_rows; ++row) {
    for (int64_t col = 0; col < w.num_cols; ++col) values[row * w.num_cols + col] = decoded(w, row, col);
  }
  return values;
}

// x [M, K] W^T + bias, in float64.
inline std::vector<double> forward_oracle(const MatrixView& w, const std::vector<float>& x, int64_t num_tokens,
                                          const float* bias) {
  const std::vector<double> weight = decoded_all(w);
  std::vector<double> out(num_tokens * w.num_rows);
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t n = 0; n < w.num_rows; ++n) {
      double sum = bias != nullptr ? bias[n] : 0.0;
      for (int64_t k = 0; k < w.num_cols; ++k) sum += x[t * w.num_cols + k] * weight[n * w.num_cols + k];
      out[t * w.num_rows + n] = sum;
    }
  }
  return out;
}

// grad_out [M, N] W, in float64.
inline std::vector<double> grad_input_oracle(const MatrixView& w, const std::vector<float>& grad_out,
                                             int64_t num_tokens) {
  const std::vector<double> weight = decoded_all(w);
  std::vector<double> out(num_tokens * w.num_cols, 0.0);
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t n = 0; n < w.num_rows; ++n) {
      const double g = grad_out[t * w.num_rows + n];
      for (int64_t k = 0; k < w.num_cols; ++k) out[t * w.num_cols + k] += g * weight[n * w.num_cols + k];
    }
  }
  return out;
}

// |value - oracle| over |oracle|, both in the 2-norm; infinite when a value is not finite.
inline double relative_error(const float* value, const std::vector<double>& oracle) {
  double difference = 0.0, size = 0.0;
  for (size_t i = 0; i < oracle.size(); ++i) {
    if (!std::isfinite(value[i])) return INFINITY;
    difference += (value[i] - oracle[i]) * (value[i] - oracle[i]);
    size += oracle[i] * oracle[i];
  }
  return size > 0.0 ? std::sqrt(difference / size) : std::sqrt(difference);
}

inline double cosine(const float* value, const std::vector<double>& oracle) {
  double dot = 0.0, a = 0.0, b = 0.0;
  for (size_t i = 0; i < oracle.size(); ++i) {
    dot += value[i] * oracle[i];
    a += static_cast<double>(value[i]) * value[i];
    b += oracle[i] * oracle[i];
  }
  return a > 0.0 && b > 0.0 ? dot / std::sqrt(a * b) : (a == b ? 1.0 : 0.0);
}

}  // namespace testing

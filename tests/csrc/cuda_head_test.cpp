// Head and boundary kernels of csrc/cuda/ on the emulator: loss and gradient against float64, records against the CPU's
// bytes.
#include <algorithm>
#include <cstring>
#include <limits>

#include "boundary/record.h"
#include "check.h"
#include "cuda/boundary.h"
#include "cuda/boundary_kernels.h"
#include "cuda/head.h"
#include "cuda/head_kernels.h"
#include "cuda/library_product.h"
#include "matrices.h"

using namespace testing;
using cuda::Device;
using cuda::Precision;

// Opened once: it is kept for the life of the process.
static void* the_library() {
  static void* opened = cuda::open_library();
  return opened;
}

struct Loss {
  std::vector<float> loss, grad;
};

struct Oracle {
  std::vector<double> loss, grad;
};

Oracle oracle(const MatrixView& w, const std::vector<float>& hidden, const std::vector<int64_t>& targets,
              const std::vector<float>& weight) {
  const int64_t tokens = static_cast<int64_t>(targets.size()), D = w.num_cols, V = w.num_rows;
  const auto z = forward_oracle(w, hidden, tokens, nullptr);
  const auto rows = decoded_all(w);
  Oracle result{std::vector<double>(tokens), std::vector<double>(tokens * D)};
  for (int64_t t = 0; t < tokens; ++t) {
    const double max = *std::max_element(&z[t * V], &z[t * V] + V);
    double sum = 0;
    for (int64_t v = 0; v < V; ++v) sum += std::exp(z[t * V + v] - max);
    result.loss[t] = max + std::log(sum) - z[t * V + targets[t]];
    for (int64_t v = 0; v < V; ++v) {
      const double p = std::exp(z[t * V + v] - max) / sum - (v == targets[t] ? 1.0 : 0.0);
      for (int64_t d = 0; d < D; ++d) result.grad[t * D + d] += weight[t] * p * rows[v * D + d];
    }
  }
  return result;
}

// The head in shards of `shard_rows`, as the engine calls it.
Loss losses(const Device& device, Precision precision, const MatrixView& w, const std::vector<float>& hidden,
            const std::vector<int64_t>& targets, const std::vector<float>* weight, int64_t shard_rows) {
  const int64_t tokens = static_cast<int64_t>(targets.size()), D = w.num_cols;
  std::vector<float> max(tokens, -INFINITY), sum(tokens, 0), logit(tokens, 0), target_row(tokens * D, 0);
  Loss result{std::vector<float>(tokens), std::vector<float>(tokens * D, 0)};
  float* grad = weight == nullptr ? nullptr : result.grad.data();
  Buffer workspace(cuda::cross_entropy_workspace_bytes(device, w.format, tokens, shard_rows, D));
  for (int64_t row = 0; row < w.num_rows; row += shard_rows) {
    const MatrixView shard = cuda::rows_of(w, row, std::min(shard_rows, w.num_rows - row));
    cuda::cross_entropy_update(device, nullptr,
                               {shard, row, hidden.data(), targets.data(), tokens, precision, max.data(), sum.data(),
                                logit.data(), grad, grad == nullptr ? nullptr : target_row.data()},
                               workspace.as<void>());
  }
  CHECK(workspace.guard_intact());
  cuda::cross_entropy_finish(
      nullptr, {tokens, D, max.data(), sum.data(), logit.data(), weight == nullptr ? nullptr : weight->data(),
                result.loss.data(), grad, target_row.data()});
  return result;
}

TEST(loss_and_gradient_match_float64) {
  for (BlockFormat format : kFormats) {
    for (int64_t rows : {65, 601}) {
      const int64_t tokens = 19, D = 45;
      const auto matrix = random_matrix(format, rows, D);
      std::vector<float> hidden = normal(tokens * D, 1), weight = normal(tokens, 2);
      for (int64_t d = 0; d < D; ++d) hidden[3 * D + d] *= 8;  // a sharp distribution among flat ones
      std::vector<int64_t> targets(tokens);
      for (int64_t t = 0; t < tokens; ++t) targets[t] = t * 31 % rows;
      const Oracle expected = oracle(matrix->view, hidden, targets, weight);
      Device plain, with_library;
      plain.num_processors = 4;
      with_library.library = the_library();
      with_library.library_from_tokens = 1;
      const struct {
        const Device& device;
        Precision precision;
        double budget;
      } modes[] = {
          {plain, Precision::exact, 1e-5}, {plain, Precision::fast, 3e-3}, {with_library, Precision::fast, 2e-2}};
      for (const auto& mode : modes) {
        const Loss got = losses(mode.device, mode.precision, matrix->view, hidden, targets, &weight, 256);
        const double loss_error = relative_error(got.loss.data(), expected.loss);
        const double grad_error = relative_error(got.grad.data(), expected.grad);
        CHECK_IN(loss_error < mode.budget && grad_error < mode.budget, "%s V=%ld budget %.0e: %.1e %.1e",
                 block_format_name(format), long(rows), mode.budget, loss_error, grad_error);
        const Loss loss_only = losses(mode.device, mode.precision, matrix->view, hidden, targets, nullptr, 256);
        CHECK(relative_error(loss_only.loss.data(), expected.loss) < mode.budget);
      }
    }
  }
}

TEST(more_tokens_than_a_chunk_holds_are_the_same_tokens) {
  const int64_t tokens = 2050, D = 9, rows = 20;
  const auto matrix = random_matrix(BlockFormat::int4, rows, D);
  const std::vector<float> hidden = normal(tokens * D, 1), weight = normal(tokens, 2);
  std::vector<int64_t> targets(tokens);
  for (int64_t t = 0; t < tokens; ++t) targets[t] = t % rows;
  const Oracle expected = oracle(matrix->view, hidden, targets, weight);
  Device plain, with_library;
  with_library.library = the_library();
  with_library.library_from_tokens = 1;
  for (const Device* device : {&plain, &with_library}) {
    const Loss got = losses(*device, Precision::fast, matrix->view, hidden, targets, &weight, rows);
    const double budget = device == &plain ? 3e-3 : 2e-2;
    CHECK(relative_error(got.loss.data(), expected.loss) < budget);
    CHECK(relative_error(got.grad.data(), expected.grad) < budget);
  }
}

TEST(a_token_that_is_not_finite_is_nan_alone) {
  const int64_t tokens = 5, D = 40, rows = 90;
  const auto matrix = random_matrix(BlockFormat::int4, rows, D);
  const std::vector<float> weight(tokens, 1.0f);
  for (Precision precision : {Precision::exact, Precision::fast}) {
    for (float bad : {NAN, INFINITY}) {
      std::vector<float> hidden = normal(tokens * D, 1);
      hidden[2 * D + 7] = bad;
      const Loss got = losses({}, precision, matrix->view, hidden, {0, 1, 2, 3, 89}, &weight, 48);
      for (int64_t t = 0; t < tokens; ++t) {
        CHECK(std::isnan(got.loss[t]) == (t == 2));
        for (int64_t d = 0; d < D; ++d) CHECK(std::isnan(got.grad[t * D + d]) == (t == 2));
      }
    }
  }
}

TEST(the_head_of_a_large_vocabulary_needs_at_most_64_mib) {
  for (int processors : {8, 16, 132}) {
    for (bool library : {false, true}) {
      Device device;
      device.num_processors = processors;
      if (library) device.library = the_library(), device.library_from_tokens = 256;
      for (int64_t tokens : {1, 64, 512, 2048, 16384}) {
        for (int64_t hidden_size : {2048, 4096, 8192}) {
          const int64_t bytes =
              cuda::cross_entropy_workspace_bytes(device, BlockFormat::int4, tokens, 128256, hidden_size);
          CHECK_IN(bytes <= int64_t{64} << 20, "%ld tokens, D=%ld: %ld", long(tokens), long(hidden_size), long(bytes));
        }
      }
    }
  }
}

const int64_t kHiddenSizes[] = {1, 2, 31, 64, 65, 127, 128, 130, 191, 256, 257, 384, 1000};

std::vector<float> hostile(int64_t count) {
  const float picks[] = {0.0f,  -0.0f,  1e-45f,   1e-38f, 1e-7f,   0.4f,     1.0f,
                         -1.0f, 127.0f, 65504.0f, -1e7f,  3.4e38f, INFINITY, NAN};
  std::mt19937 random(5);
  std::vector<float> values(count);
  uint32_t kinds = 1;
  for (int64_t i = 0; i < count; ++i) {
    if (i % 97 == 0) kinds = 1 + random() % 14;
    values[i] = picks[random() % kinds];
  }
  return values;
}

std::vector<uint8_t> cpu_records(const std::vector<float>& hidden, int64_t D, CacheFormat format,
                                 const BottleneckView* adapter) {
  const int64_t tokens = static_cast<int64_t>(hidden.size()) / D;
  std::vector<uint8_t> records(tokens * record_bytes(format, D));
  boundary_encode(hidden.data(), tokens, D, adapter, format, records.data());
  return records;
}

std::vector<uint8_t> device_records(const std::vector<float>& hidden, int64_t D, CacheFormat format,
                                    const BottleneckView* adapter) {
  const int64_t tokens = static_cast<int64_t>(hidden.size()) / D;
  Buffer records(tokens * record_bytes(format, D));
  cuda::boundary_encode(nullptr, {hidden.data(), tokens, D, adapter == nullptr ? BottleneckView{} : *adapter, format,
                                  records.as<uint8_t>(), record_bytes(format, D)});
  CHECK(records.guard_intact());
  return {records.as<uint8_t>(), records.as<uint8_t>() + tokens * record_bytes(format, D)};
}

TEST(records_are_byte_for_byte_the_cpus) {
  set_simd_level(SimdLevel::scalar);
  for (int64_t D : kHiddenSizes) {
    for (const auto& hidden : {normal(5 * D, 3), hostile(11 * D)}) {
      for (CacheFormat format : {CacheFormat::int8, CacheFormat::bf16, CacheFormat::f32}) {
        const auto expected = cpu_records(hidden, D, format, nullptr);
        CHECK_IN(device_records(hidden, D, format, nullptr) == expected, "D=%ld format %d", long(D), int(format));
      }
    }
  }
  reset_simd_level();
}

TEST(decoding_scatters_the_cpus_values) {
  for (int64_t D : kHiddenSizes) {
    for (CacheFormat format : {CacheFormat::int8, CacheFormat::bf16, CacheFormat::f32}) {
      auto records = cpu_records(normal(4 * D, 3), D, format, nullptr);
      if (format == CacheFormat::int8 && num_outliers(D) > 1) {  // damage: one column twice, one outside the row
        const int64_t at = outliers_offset(D);
        std::memcpy(&records[at + kOutlierBytes], &records[at], 2);
        records[record_bytes(format, D) + at] = 0xFE, records[record_bytes(format, D) + at + 1] = 0xFF;
      }
      const int64_t rows[] = {6, 0, 3, 2};
      std::vector<float> expected(7 * D, 42.0f), got(7 * D, 42.0f);
      boundary_decode(records.data(), 4, D, format, rows, expected.data());
      cuda::boundary_decode(nullptr, {records.data(), 4, D, record_bytes(format, D), format, rows, got.data(), 7});
      CHECK_IN(std::memcmp(expected.data(), got.data(), expected.size() * 4) == 0, "D=%ld", long(D));
    }
  }
}

TEST(the_fused_adapter_matches_float64) {
  for (int64_t D : {1, 33, 200}) {
    for (int64_t R : {1, 16, 40}) {
      const int64_t tokens = 11;
      const auto hidden = normal(tokens * D, 1), down = normal(R * D, 2), down_bias = normal(R, 3);
      const auto up = normal(D * R, 4), up_bias = normal(D, 5);
      const BottleneckView adapter{R, down.data(), down_bias.data(), up.data(), up_bias.data()};
      const auto records = device_records(hidden, D, CacheFormat::f32, &adapter);
      std::vector<double> expected(tokens * D);
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t d = 0; d < D; ++d) expected[t * D + d] = hidden[t * D + d] + up_bias[d];
        for (int64_t r = 0; r < R; ++r) {
          double x = down_bias[r];
          for (int64_t d = 0; d < D; ++d) x += static_cast<double>(down[r * D + d]) * hidden[t * D + d];
          const double y = 0.5 * x * std::erfc(-x / std::sqrt(2.0));
          for (int64_t d = 0; d < D; ++d) expected[t * D + d] += up[d * R + r] * y;
        }
      }
      CHECK_IN(relative_error(reinterpret_cast<const float*>(records.data()), expected) < 1e-6, "D=%ld R=%ld", long(D),
               long(R));
    }
  }
}

TEST(shared_memory_of_the_widest_adapter_fits_every_architecture) {
  for (int64_t D : {64, 4096, 16384}) {
    for (int64_t R : {0, 16, 256, 2048}) CHECK(cuda::Encode::shared_bytes(D, R) <= 99 << 10);
  }
  CHECK(cuda::Encode::shared_bytes(kMaxInt8HiddenSize, 0) <= 48 << 10);
}

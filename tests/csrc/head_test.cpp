// Cross-entropy without logits at every SIMD level against float64 over the decoded weights: loss, gradient, shards,
// threads, non-finite rows, and the bound on what leaving out the softmax's tail may change.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "base/simd_level.h"
#include "base/thread_pool.h"
#include "chainfed/kernels.h"
#include "check.h"
#include "head/cell.h"
#include "head/int16_cell.h"

namespace {

using namespace chainfed;

const float kNan = std::numeric_limits<float>::quiet_NaN();

struct Buffer {  // 64-byte aligned bytes
  std::vector<char> bytes;
  void* data = nullptr;
  explicit Buffer(int64_t size) : bytes(size + 64) {
    data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) / 64 * 64);
  }
};

struct Shard {
  Buffer codes, scales;
  MatrixView view;
  Shard(const float* weight, int64_t num_rows, int64_t num_cols, BlockFormat format)
      : codes(codes_bytes(format, num_rows, num_cols)), scales(scales_bytes(format, num_rows, num_cols)) {
    quantize_blocks(weight, num_rows, num_cols, format, codes.data, scales.data);
    view = {format, num_rows, num_cols, codes.data, scales_bytes(format, num_rows, num_cols) ? scales.data : nullptr};
  }
};

struct Problem {
  int64_t num_tokens, vocabulary, hidden_size;
  std::vector<float> weight, hidden, token_weight;
  std::vector<int64_t> targets;

  Problem(int64_t T, int64_t V, int64_t D, float spread = 1.0f) : num_tokens(T), vocabulary(V), hidden_size(D) {
    std::mt19937 random(static_cast<uint32_t>(T * 7919 + V * 31 + D));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < V * D; ++i) weight.push_back(normal(random));
    for (int64_t i = 0; i < T * D; ++i) hidden.push_back(normal(random) * spread / std::sqrt(static_cast<float>(D)));
    for (int64_t t = 0; t < T; ++t) {
      targets.push_back(static_cast<int64_t>(random() % static_cast<uint32_t>(V)));
      token_weight.push_back(0.25f + static_cast<float>(t % 3));
    }
  }
};

struct Result {
  std::vector<float> loss, grad;
};

Result run(const Problem& p, BlockFormat format, Activation activation, bool with_grad = true,
           std::vector<int64_t> cuts = {}) {
  const int64_t T = p.num_tokens, D = p.hidden_size;
  std::vector<float> max(T, -std::numeric_limits<float>::infinity()), sum(T, 0), target_logit(T, 0),
      target_row(T * D, 0);
  Result result{std::vector<float>(T, 0), std::vector<float>(T * D, 0)};
  float* grad = with_grad ? result.grad.data() : nullptr;
  cuts.push_back(p.vocabulary);
  int64_t begin = 0;
  for (int64_t end : cuts) {
    const Shard shard(p.weight.data() + begin * D, end - begin, D, format);
    Buffer workspace(cross_entropy_workspace_bytes(format, T, end - begin, D));
    cross_entropy_update(shard.view, begin, p.hidden.data(), p.targets.data(), T, activation, max.data(), sum.data(),
                         target_logit.data(), grad, with_grad ? target_row.data() : nullptr, workspace.data);
    begin = end;
  }
  cross_entropy_finish(T, D, max.data(), sum.data(), target_logit.data(), p.token_weight.data(), result.loss.data(),
                       grad, with_grad ? target_row.data() : nullptr);
  return result;
}

struct Exact {
  std::vector<double> loss, grad;
};

Exact exact(const Problem& p, BlockFormat format) {
  const int64_t T = p.num_tokens, V = p.vocabulary, D = p.hidden_size;
  const Shard shard(p.weight.data(), V, D, format);
  std::vector<float> w(V * D);
  dequantize_rows(shard.view, 0, V, w.data());
  Exact result{std::vector<double>(T), std::vector<double>(T * D)};
  std::vector<double> z(V);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t v = 0; v < V; ++v) {
      z[v] = 0;
      for (int64_t d = 0; d < D; ++d) z[v] += static_cast<double>(p.hidden[t * D + d]) * w[v * D + d];
    }
    const double max = *std::max_element(z.begin(), z.end());
    double sum = 0;
    for (double value : z) sum += std::exp(value - max);
    result.loss[t] = max + std::log(sum) - z[p.targets[t]];
    for (int64_t v = 0; v < V; ++v) {
      const double share = std::exp(z[v] - max) / sum - (v == p.targets[t] ? 1 : 0);
      for (int64_t d = 0; d < D; ++d) result.grad[t * D + d] += p.token_weight[t] * share * w[v * D + d];
    }
  }
  return result;
}

template <typename A, typename B>
double distance(const std::vector<A>& a, const std::vector<B>& b) {  // |a - b| / |b|
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - static_cast<double>(b[i])) * (a[i] - static_cast<double>(b[i]));
    norm += static_cast<double>(b[i]) * b[i];
  }
  return std::sqrt(difference / (norm + 1e-300));
}

double cosine(const std::vector<float>& a, const std::vector<double>& b) {
  double dot = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    dot += a[i] * b[i];
    aa += static_cast<double>(a[i]) * a[i];
    bb += b[i] * b[i];
  }
  return dot / std::sqrt(aa * bb);
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

template <typename Body>
void at_every_level(Body body) {
  for (int i = 0; i <= static_cast<int>(supported_simd_level()); ++i) {
    set_simd_level(static_cast<SimdLevel>(i));
    body(simd_level_name(static_cast<SimdLevel>(i)));
  }
  reset_simd_level();
}

constexpr BlockFormat kFormats[] = {BlockFormat::int4, BlockFormat::nf4, BlockFormat::int8, BlockFormat::bf16,
                                    BlockFormat::f32};

TEST(decoded_weights_give_the_float64_loss_and_gradient) {
  const int64_t sizes[][3] = {{1, 1, 1}, {1, 7, 5}, {3, 130, 33}, {5, 513, 64}, {17, 1100, 100}, {261, 140, 40}};
  for (const auto& size : sizes) {
    const Problem p(size[0], size[1], size[2], 3.0f);
    for (BlockFormat format : kFormats) {
      const Exact expected = exact(p, format);
      at_every_level([&](const char* level) {
        const Result got = run(p, format, Activation::f32);
        for (int64_t t = 0; t < p.num_tokens; ++t) {
          CHECK_IN(std::fabs(got.loss[t] - expected.loss[t]) <= 1e-5 * std::max(1.0, std::fabs(expected.loss[t])),
                   "T=%ld V=%ld D=%ld %s %s: %.8g, expected %.8g", long(size[0]), long(size[1]), long(size[2]),
                   block_format_name(format), level, got.loss[t], expected.loss[t]);
        }
        CHECK_IN(distance(got.grad, expected.grad) <= 1e-5, "T=%ld V=%ld D=%ld %s %s: %g", long(size[0]), long(size[1]),
                 long(size[2]), block_format_name(format), level, distance(got.grad, expected.grad));
      });
    }
  }
}

TEST(quantised_activations_keep_the_gradients_direction) {
  const Problem p(70, 3000, 192, 4.0f);
  for (BlockFormat format : kFormats) {
    const Exact expected = exact(p, format);
    at_every_level([&](const char* level) {
      const Result got = run(p, format, Activation::int8);
      CHECK_IN(cosine(got.grad, expected.grad) >= 0.9999, "%s %s: %.7f", block_format_name(format), level,
               cosine(got.grad, expected.grad));
      CHECK_IN(distance(got.loss, expected.loss) <= 0.01, "%s %s: %g", block_format_name(format), level,
               distance(got.loss, expected.loss));
    });
  }
}

TEST(shards_give_what_one_matrix_gives) {
  const Problem p(37, 1500, 72, 5.0f);
  at_every_level([&](const char* level) {
    const Result one = run(p, BlockFormat::int8, Activation::f32);
    const Result several = run(p, BlockFormat::int8, Activation::f32, true, {8, 136, 776, 1488});
    CHECK_IN(distance(several.loss, one.loss) <= 1e-6, "%s: %g", level, distance(several.loss, one.loss));
    CHECK_IN(distance(several.grad, one.grad) <= 1e-5, "%s: %g", level, distance(several.grad, one.grad));
  });
}

TEST(the_loss_alone_is_the_loss_of_the_gradient_pass) {
  const Problem p(37, 1500, 72);
  for (Activation activation : {Activation::int8, Activation::f32}) {
    at_every_level([&](const char* level) {
      CHECK_IN(same_bits(run(p, BlockFormat::int8, activation, false, {512}).loss,
                         run(p, BlockFormat::int8, activation, true, {512}).loss),
               "%s", level);
    });
  }
}

TEST(a_row_does_not_depend_on_other_rows_or_threads) {
  const Problem p(43, 700, 70, 8.0f);
  at_every_level([&](const char* level) {
    set_num_threads(1);
    const Result all = run(p, BlockFormat::int8, Activation::int8);
    set_num_threads(3);
    const Result threaded = run(p, BlockFormat::int8, Activation::int8);
    CHECK_IN(same_bits(all.loss, threaded.loss) && same_bits(all.grad, threaded.grad), "%s", level);
    for (int64_t t : {0, 1, 6, 42}) {
      Problem one = p;
      one.num_tokens = 1;
      one.hidden.assign(p.hidden.begin() + t * 70, p.hidden.begin() + (t + 1) * 70);
      one.targets = {p.targets[t]};
      one.token_weight = {p.token_weight[t]};
      const Result alone = run(one, BlockFormat::int8, Activation::int8);
      const std::vector<float> row(all.grad.begin() + t * 70, all.grad.begin() + (t + 1) * 70);
      CHECK_IN(alone.loss[0] == all.loss[t] && same_bits(alone.grad, row), "%s token %ld", level, long(t));
    }
  });
  set_num_threads(2);
}

TEST(a_non_finite_row_loses_alone) {
  Problem p(9, 600, 40);
  const Problem clean = p;
  p.hidden[2 * 40 + 7] = kNan;
  p.hidden[5 * 40 + 39] = std::numeric_limits<float>::infinity();
  p.hidden[7 * 40] = -std::numeric_limits<float>::infinity();
  for (int64_t d = 0; d < 40; ++d) p.hidden[8 * 40 + d] = 3e38f;  // finite, but its logits overflow
  for (Activation activation : {Activation::int8, Activation::f32}) {
    at_every_level([&](const char* level) {
      const Result got = run(p, BlockFormat::int8, activation, true, {104}),
                   good = run(clean, BlockFormat::int8, activation, true, {104});
      for (int64_t t = 0; t < 9; ++t) {
        const bool lost = t == 2 || t == 5 || t == 7 || t == 8;
        CHECK_IN(lost ? std::isnan(got.loss[t]) : got.loss[t] == good.loss[t], "%s token %ld: %g", level, long(t),
                 got.loss[t]);
        for (int64_t d = t * 40; d < (t + 1) * 40; ++d) {
          CHECK_IN(lost ? std::isnan(got.grad[d]) : got.grad[d] == good.grad[d], "%s token %ld", level, long(t));
        }
      }
    });
  }
}

// Peaked rows, where nearly every weight is below the cutoff: the bound of cell.h holds, with room for f32 rounding.
TEST(leaving_out_the_tail_keeps_its_bound) {
  for (float spread : {8.0f, 20.0f, 100.0f}) {
    const Problem p(24, 4000, 64, spread);
    const Exact expected = exact(p, BlockFormat::f32);
    double largest = 0;
    for (int64_t v = 0; v < p.vocabulary; ++v) {
      double norm = 0;
      for (int64_t d = 0; d < 64; ++d) norm += static_cast<double>(p.weight[v * 64 + d]) * p.weight[v * 64 + d];
      largest = std::max(largest, std::sqrt(norm));
    }
    at_every_level([&](const char* level) {
      const Result got = run(p, BlockFormat::f32, Activation::int8);  // f32 weights: the activations stay exact
      for (int64_t t = 0; t < p.num_tokens; ++t) {
        double error = 0;
        for (int64_t d = t * 64; d < (t + 1) * 64; ++d) {
          error += (got.grad[d] - expected.grad[d]) * (got.grad[d] - expected.grad[d]);
        }
        const double bound = p.token_weight[t] * 2 * largest * (p.vocabulary * kCutoffInt8 + 3e-5);
        CHECK_IN(std::sqrt(error) <= bound, "%s token %ld: %g > %g", level, long(t), std::sqrt(error), bound);
      }
    });
  }
}

// What the cells list and leave out, against the scalar oracle.
TEST(cells_are_the_same_at_every_level) {
  std::mt19937 random(3);
  for (int64_t count : {1, 3, 4, 15, 16, 17, 100, 127, 128}) {
    std::vector<float> e(4 * 128);
    for (float& value : e) value = std::exp2(-static_cast<float>(random() % 40));
    const float* rows[] = {&e[0], &e[128], &e[256], &e[384]};
    const float least[] = {1e-6f, 1e-3f, 1.0f, 0.5f};
    Cell expected, got;
    fill_cell_scalar(rows, count, least, &expected);
    const auto compare = [&](FillCell fill_cell) {
      fill_cell(rows, count, least, &got);
      CHECK_IN(got.count == expected.count, "count %ld: %d, expected %d", long(count), got.count, expected.count);
      for (int32_t k = 0; k < std::min(got.count, expected.count); ++k) {
        CHECK_IN(got.row[k] == expected.row[k], "count %ld", long(count));
        for (int t = 0; t < 4; ++t) {
          CHECK_IN(std::fabs(got.weight[k][t] - expected.weight[k][t]) <= 1e-5f * expected.weight[k][t], "row %d",
                   expected.row[k]);
        }
      }
    };
#if defined(CHAINFED_X86)
    if (supported_simd_level() >= SimdLevel::avx2) compare(fill_cell_avx2);
    if (supported_simd_level() >= SimdLevel::avx512vnni) compare(fill_cell_avx512vnni);
#elif defined(CHAINFED_ARM64)
    if (supported_simd_level() >= SimdLevel::neon) compare(fill_cell_neon);
#endif
    compare(fill_cell_scalar);
  }
}

struct Int16Level {
  const char* name;
  QuantizeCell quantize_cell;
  QuantizePanel quantize_panel;
  AccumulateInt16 accumulate;
};

std::vector<Int16Level> int16_levels() {
  std::vector<Int16Level> found = {{"scalar", quantize_cell_scalar, quantize_panel_scalar, accumulate_int16_scalar}};
#if defined(CHAINFED_X86)
  if (supported_simd_level() >= SimdLevel::avx2) {
    found.push_back({"avx2", quantize_cell_avx2, quantize_panel_avx2, accumulate_int16_avx2});
  }
  if (supported_simd_level() >= SimdLevel::avx512vnni) {
    found.push_back({"avx512vnni", quantize_cell_avx2, quantize_panel_avx2, accumulate_int16_avx512vnni});
  }
#elif defined(CHAINFED_ARM64)
  found.push_back({"neon", quantize_cell_neon, quantize_panel_neon, accumulate_int16_neon});
#endif
  return found;
}

// One cell times one panel, with the worst case for 32-bit sums: equal weights and rows of the column's largest value.
TEST(integer_products_stay_within_their_error_and_never_overflow) {
  std::mt19937 random(11);
  alignas(64) static float panel[(kCellRows + 1) * kPanelCols];
  static Int16Panel integer_panel;
  for (int kind = 0; kind < 4; ++kind) {
    for (int32_t count : {0, 1, 2, 3, 64, 128, 129}) {
      for (float& w : panel) w = kind == 0 ? 3.0f : kind == 1 ? -3.0f : static_cast<float>(random() % 2001) / 1000 - 1;
      static Cell cell;
      static Int16Cell integer_cell;
      cell.count = count;
      double total[4] = {};
      for (int32_t k = 0; k < count; ++k) {
        cell.row[k] = static_cast<uint8_t>(k);
        for (int t = 0; t < 4; ++t) {
          cell.weight[k][t] = kind < 3 ? 0.7f : std::exp2(-static_cast<float>(random() % 60));
          if (t == 3) cell.weight[k][t] = 0;
          total[t] += cell.weight[k][t];
        }
      }
      for (const Int16Level& level : int16_levels()) {
        float grad[4][kPanelCols] = {};
        float* rows[] = {grad[0], grad[1], grad[2], grad[3]};
        level.quantize_cell(cell, &integer_cell);
        level.quantize_panel(panel, kCellRows, &integer_panel);
        level.accumulate(integer_cell, integer_panel, rows);
        double worst = 0;  // in units of the bound
        for (int t = 0; t < 4; ++t) {
          for (int64_t c = 0; c < kPanelCols; ++c) {
            double expected = 0;
            for (int32_t k = 0; k < count; ++k) {
              expected += static_cast<double>(cell.weight[k][t]) * panel[k * kPanelCols + c];
            }
            worst = std::max(worst, std::fabs(grad[t][c] - expected) / (1.1e-3 * total[t] * 3 + 1e-30));
          }
        }
        CHECK_IN(worst <= 1, "%s kind %d count %d: %g", level.name, kind, count, worst);
      }
    }
  }
}

TEST(the_workspace_stays_small_whatever_the_vocabulary) {
  for (BlockFormat format : kFormats) {
    const int64_t bytes = cross_entropy_workspace_bytes(format, 256, 8192, 8192);
    CHECK_IN(bytes <= 16 << 20, "%s: %ld", block_format_name(format), long(bytes));
    CHECK(cross_entropy_workspace_bytes(format, 100000, 200000, 8192) == bytes);
  }
}

}  // namespace

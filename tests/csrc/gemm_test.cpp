// The quantised linear at every SIMD level against float64, with odd sizes, corners and guards.
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "base/thread_pool.h"
#include "check.h"
#include "gemm/linear.h"
#include "matrices.h"

using namespace testing;

// f32 sums of at most 8192 products in blocks of 256: rounding grows with the root of the length, well below 1e-6.
constexpr double kExactBudget = 1e-6;
// int8 activations: a step of absmax / 127 per 32 inputs is about 0.5 % of a normal input's root mean square; nf4 with
// the 7-bit codebook adds 0.7 %. Short rows scatter, hence the factor.
constexpr double kInt8Budget = 0.02;

struct Shape {
  int64_t tokens, rows, cols;
};

std::vector<Shape> shapes() {
  std::vector<Shape> all;
  for (int i = 0; i < kNumOddSizes; ++i) {  // every size in every role
    all.push_back({kOddSizes[i], kOddSizes[(i + 4) % kNumOddSizes], kOddSizes[(i + 9) % kNumOddSizes]});
    all.push_back({kOddSizes[(i + 7) % kNumOddSizes], kOddSizes[i], kOddSizes[i]});
  }
  all.push_back({5, 40, 1100});   // several blocks of inputs
  all.push_back({300, 20, 70});   // several chunks of tokens
  all.push_back({390, 300, 33});  // several chunks and blocks of the exact product
  return all;
}

std::vector<float> forward(const MatrixView& w, const std::vector<float>& x, int64_t tokens, const float* bias,
                           Activation activation) {
  Buffer out(tokens * w.num_rows * 4);
  Buffer workspace(linear_forward_workspace_bytes(w.format, tokens, w.num_rows, w.num_cols));
  linear_forward(w, x.data(), tokens, bias, activation, out.as<float>(), workspace.as<void>());
  CHECK(out.guard_intact() && workspace.guard_intact());
  return {out.as<float>(), out.as<float>() + tokens * w.num_rows};
}

std::vector<float> grad_input(const MatrixView& w, const std::vector<float>& grad_out, int64_t tokens) {
  Buffer out(tokens * w.num_cols * 4);
  Buffer workspace(linear_grad_input_workspace_bytes(w.format, tokens, w.num_rows, w.num_cols));
  linear_grad_input(w, grad_out.data(), tokens, out.as<float>(), workspace.as<void>());
  CHECK(out.guard_intact() && workspace.guard_intact());
  return {out.as<float>(), out.as<float>() + tokens * w.num_cols};
}

TEST(forward_and_grad_input_match_float64_at_every_level) {
  for (BlockFormat format : kFormats) {
    for (const Shape& shape : shapes()) {
      const auto matrix = random_matrix(format, shape.rows, shape.cols);
      const std::vector<float> x = normal(shape.tokens * shape.cols, 1), g = normal(shape.tokens * shape.rows, 2);
      const std::vector<float> bias = normal(shape.rows, 3);
      const auto expected = forward_oracle(matrix->view, x, shape.tokens, bias.data());
      const auto expected_grad = grad_input_oracle(matrix->view, g, shape.tokens);
      for (SimdLevel level : levels()) {
        set_simd_level(level);
        const auto exact = forward(matrix->view, x, shape.tokens, bias.data(), Activation::f32);
        const auto fast = forward(matrix->view, x, shape.tokens, bias.data(), Activation::int8);
        const auto grad = grad_input(matrix->view, g, shape.tokens);
        const double errors[] = {relative_error(exact.data(), expected), relative_error(fast.data(), expected),
                                 relative_error(grad.data(), expected_grad)};
        CHECK_IN(errors[0] < kExactBudget && errors[1] < kInt8Budget && errors[2] < kExactBudget,
                 "%s %s M=%ld N=%ld K=%ld: %.2e %.2e %.2e", block_format_name(format), simd_level_name(level),
                 long(shape.tokens), long(shape.rows), long(shape.cols), errors[0], errors[1], errors[2]);
      }
    }
  }
  reset_simd_level();
}

TEST(int8_activations_keep_the_cosine) {
  for (BlockFormat format : {BlockFormat::int4, BlockFormat::nf4, BlockFormat::int8}) {
    const auto matrix = random_matrix(format, 96, 2048);
    const std::vector<float> x = normal(24 * 2048, 9);
    const auto expected = forward_oracle(matrix->view, x, 24, nullptr);
    for (SimdLevel level : levels()) {
      set_simd_level(level);
      const auto out = forward(matrix->view, x, 24, nullptr, Activation::int8);
      CHECK_IN(cosine(out.data(), expected) >= 0.9999, "%s %s: %.6f", block_format_name(format), simd_level_name(level),
               cosine(out.data(), expected));
    }
  }
  reset_simd_level();
}

TEST(a_long_row_stays_within_one_millionth) {
  const auto matrix = random_matrix(BlockFormat::f32, 8, 8192);
  const std::vector<float> x = normal(8 * 8192, 4);
  const auto expected = forward_oracle(matrix->view, x, 8, nullptr);
  for (SimdLevel level : levels()) {
    set_simd_level(level);
    CHECK(relative_error(forward(matrix->view, x, 8, nullptr, Activation::f32).data(), expected) < kExactBudget);
  }
  reset_simd_level();
}

// All codes at their largest and activations at +-127: sums that a careless int16 kernel saturates.
TEST(the_saturation_corner_is_exact) {
  const int64_t rows = 16, cols = 1024, tokens = 8;
  for (BlockFormat format : {BlockFormat::int4, BlockFormat::int8}) {
    for (int code : {15, 127, -127, -128}) {
      if (format == BlockFormat::int4 ? code != 15 : code == 15) continue;
      Quantised matrix(format, rows, cols);
      std::memset(matrix.codes.as<void>(), format == BlockFormat::int4 ? 0xFF : code & 0xFF,
                  codes_bytes(format, rows, cols));
      const int64_t per_tile = format == BlockFormat::int4 ? 16 : 8;
      for (int64_t i = 0; i < scales_bytes(format, rows, cols) / 2; ++i) {
        matrix.scales.as<uint16_t>()[i] = i % per_tile < 8 ? 0x3C00 : 0;  // scale 1, offset 0
      }
      for (float sign : {1.0f, -1.0f}) {
        const std::vector<float> x(tokens * cols, sign * 127.0f);
        for (SimdLevel level : levels()) {
          set_simd_level(level);
          for (float value : forward(matrix.view, x, tokens, nullptr, Activation::int8)) {
            CHECK_IN(value == sign * 127.0f * static_cast<float>(code * cols), "%s code %d: %f", simd_level_name(level),
                     code, value);
          }
        }
      }
    }
  }
  reset_simd_level();
}

// What a level that brings blocks to one scale must carry: scales of either sign, far apart inside a row, and -128.
TEST(scales_of_either_sign_and_of_any_size_keep_the_budget) {
  const int64_t rows = 75, cols = 1100, tokens = 9;
  const std::vector<float> x = normal(tokens * cols, 5), factors = normal(rows * cols, 6);
  for (BlockFormat format : {BlockFormat::int4, BlockFormat::nf4, BlockFormat::int8}) {
    const auto matrix = random_matrix(format, rows, cols);
    const int64_t per_scale = format == BlockFormat::nf4 ? 4 : 2;
    const int64_t num_scales = scales_bytes(format, rows, cols) / per_scale;
    for (int64_t i = 0; i < num_scales; ++i) {
      const float factor = factors[i] * std::exp2(3.0f * factors[num_scales + i]);
      if (format == BlockFormat::nf4) {
        matrix->scales.as<float>()[i] *= factor;
      } else {
        uint16_t& half = matrix->scales.as<uint16_t>()[i];
        half = float_to_f16(f16_to_float(half) * factor);
      }
    }
    if (format == BlockFormat::int8) {
      for (int64_t i = 0; i < codes_bytes(format, rows, cols); i += 97) matrix->codes.as<int8_t>()[i] = -128;
    }
    const auto expected = forward_oracle(matrix->view, x, tokens, nullptr);
    for (SimdLevel level : levels()) {
      set_simd_level(level);
      const double error = relative_error(forward(matrix->view, x, tokens, nullptr, Activation::int8).data(), expected);
      CHECK_IN(error < kInt8Budget, "%s %s: %.2e", block_format_name(format), simd_level_name(level), error);
    }
  }
  reset_simd_level();
}

TEST(a_nan_or_inf_scale_spoils_its_own_row_and_no_other) {
  for (BlockFormat format : {BlockFormat::int4, BlockFormat::int8}) {
    for (int bad : {0x7E00, 0x7C00, 0xFC00}) {
      const auto matrix = random_matrix(format, 37, 600);
      const int64_t tile = 33 / 8 * (608 / 32) + 7;  // of row 33
      matrix->scales.as<uint16_t>()[tile * (format == BlockFormat::int4 ? 16 : 8) + 33 % 8] =
          static_cast<uint16_t>(bad);
      const std::vector<float> x = normal(7 * 600, 6);
      for (SimdLevel level : levels()) {
        set_simd_level(level);
        const auto out = forward(matrix->view, x, 7, nullptr, Activation::int8);
        for (int64_t i = 0; i < 7 * 37; ++i) CHECK(std::isfinite(out[i]) == (i % 37 != 33));
      }
    }
  }
  reset_simd_level();
}

TEST(a_nan_or_inf_input_makes_its_own_row_nan_and_no_other) {
  for (BlockFormat format : kFormats) {
    const auto matrix = random_matrix(format, 21, 70);
    for (float bad : {NAN, INFINITY, -INFINITY}) {
      std::vector<float> x = normal(9 * 70, 6);
      x[4 * 70 + 69] = bad;
      for (SimdLevel level : levels()) {
        set_simd_level(level);
        const auto out = forward(matrix->view, x, 9, nullptr, Activation::int8);
        for (int64_t i = 0; i < 9 * 21; ++i) {
          // bf16 and f32 weights multiply in f32, where an infinity times a weight stays infinite.
          CHECK(std::isfinite(out[i]) == (i / 21 != 4));
          if (format != BlockFormat::bf16 && format != BlockFormat::f32) CHECK(std::isnan(out[i]) == (i / 21 == 4));
        }
      }
    }
  }
  reset_simd_level();
}

TEST(tiny_and_huge_inputs_stay_finite) {
  const auto matrix = random_matrix(BlockFormat::int4, 8, 64);
  for (float size : {1e-44f, 1e-38f, 1e-30f, 1e30f}) {
    std::vector<float> x = normal(3 * 64, 8);
    for (float& value : x) value *= size;
    for (SimdLevel level : levels()) {
      set_simd_level(level);
      for (float value : forward(matrix->view, x, 3, nullptr, Activation::int8)) CHECK(std::isfinite(value));
    }
  }
  reset_simd_level();
}

TEST(results_do_not_depend_on_threads_or_on_other_rows) {
  const int64_t tokens = 70, rows = 50, cols = 600;
  for (BlockFormat format : kFormats) {
    const auto matrix = random_matrix(format, rows, cols);
    const std::vector<float> x = normal(tokens * cols, 1), g = normal(tokens * rows, 2);
    for (SimdLevel level : levels()) {
      set_simd_level(level);
      set_num_threads(1);
      const auto exact = forward(matrix->view, x, tokens, nullptr, Activation::f32);
      const auto fast = forward(matrix->view, x, tokens, nullptr, Activation::int8);
      const auto grad = grad_input(matrix->view, g, tokens);
      for (int threads : {2, 3, 8}) {
        set_num_threads(threads);
        CHECK(forward(matrix->view, x, tokens, nullptr, Activation::f32) == exact);
        CHECK(forward(matrix->view, x, tokens, nullptr, Activation::int8) == fast);
        CHECK(grad_input(matrix->view, g, tokens) == grad);
      }
      for (int64_t row : {0, 3, 69}) {
        const std::vector<float> one(x.begin() + row * cols, x.begin() + (row + 1) * cols);
        const std::vector<float> one_grad(g.begin() + row * rows, g.begin() + (row + 1) * rows);
        const auto alone = forward(matrix->view, one, 1, nullptr, Activation::f32);
        const auto alone_fast = forward(matrix->view, one, 1, nullptr, Activation::int8);
        const auto alone_grad = grad_input(matrix->view, one_grad, 1);
        CHECK(std::memcmp(alone.data(), &exact[row * rows], rows * 4) == 0);
        CHECK(std::memcmp(alone_fast.data(), &fast[row * rows], rows * 4) == 0);
        CHECK(std::memcmp(alone_grad.data(), &grad[row * cols], cols * 4) == 0);
      }
    }
  }
  set_num_threads(2);
  reset_simd_level();
}

TEST(grad_input_add_adds) {
  const auto matrix = random_matrix(BlockFormat::int4, 300, 40);
  const std::vector<float> g = normal(7 * 300, 2);
  const auto plain = grad_input(matrix->view, g, 7);
  std::vector<float> sum(7 * 40, 1.0f);
  Buffer workspace(linear_grad_input_workspace_bytes(BlockFormat::int4, 7, 300, 40));
  linear_grad_input_add(matrix->view, g.data(), 7, sum.data(), workspace.as<void>());
  for (size_t i = 0; i < sum.size(); ++i) CHECK(std::fabs(sum[i] - 1.0f - plain[i]) < 1e-3f);
}

TEST(no_tokens_are_no_work) {
  const auto matrix = random_matrix(BlockFormat::int4, 8, 32);
  CHECK(linear_forward_workspace_bytes(BlockFormat::int4, 0, 8, 32) == 0);
  linear_forward(matrix->view, nullptr, 0, nullptr, Activation::int8, nullptr, nullptr);
  linear_forward(matrix->view, nullptr, 0, nullptr, Activation::f32, nullptr, nullptr);
  linear_grad_input(matrix->view, nullptr, 0, nullptr, nullptr);
}

#if !defined(__SANITIZE_THREAD__)  // the thread sanitizer does not follow threads started after fork
TEST(a_forked_child_computes_the_same) {
  const auto matrix = random_matrix(BlockFormat::int4, 64, 256);
  const std::vector<float> x = normal(32 * 256, 1);
  const auto expected = forward(matrix->view, x, 32, nullptr, Activation::int8);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(forward(matrix->view, x, 32, nullptr, Activation::int8) == expected ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
#endif

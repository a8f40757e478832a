// The device code of csrc/cuda/ on the emulator: orders, codes, and whole products against float64, at odd sizes.
#include <algorithm>

#include "check.h"
#include "cuda/boundary.h"
#include "cuda/crossover.h"
#include "cuda/fused.h"
#include "cuda/library_product.h"
#include "cuda/linear.h"
#include "cuda/prepare.h"
#include "cuda/runtime.h"
#include "cuda/weights.h"
#include "matrices.h"

using namespace testing;
using cuda::Device;
using cuda::Direction;
using cuda::Precision;

// Opened once: it is kept for the life of the process.
static void* the_library() {
  static void* opened = cuda::open_library();
  return opened;
}

// Two factors of 11 bits each, and for nf4 a third rounding of table and scale: 2 to 3 e-4 of the product.
constexpr double kFusedBudget = 1e-3;
constexpr double kLibraryBudget = 6e-3;  // two factors of 8 bits
constexpr double kExactBudget = 1e-6;

std::vector<float> product(const Device& device, const MatrixView& w, Direction direction, Precision precision,
                           const std::vector<float>& x, int64_t tokens, const float* bias, bool accumulate = false,
                           float start = 0.0f) {
  const int64_t outputs = direction == Direction::forward ? w.num_rows : w.num_cols;
  Buffer out(tokens * outputs * 4);
  std::fill(out.as<float>(), out.as<float>() + tokens * outputs, start);
  Buffer workspace(cuda::linear_workspace_bytes(device, w.format, direction, tokens, w.num_rows, w.num_cols));
  cuda::linear(device, nullptr, {w, direction, precision, x.data(), tokens, bias, out.as<float>(), accumulate},
               workspace.as<void>());
  CHECK(out.guard_intact() && workspace.guard_intact());
  return {out.as<float>(), out.as<float>() + tokens * outputs};
}

TEST(orders_name_every_place_once) {
  for (Direction direction : {Direction::forward, Direction::grad}) {
    bool sources[32] = {};
    for (int i = 0; i < 32; ++i) sources[cuda::source_of_position(direction, i)] = true;
    CHECK(std::all_of(sources, sources + 32, [](bool s) { return s; }));
    bool seen[64] = {};
    for (int c = 0; c < 8; ++c) {
      for (int n = 0; n < 8; ++n) seen[cuda::output_of_fragment(direction, c, n)] = true;
    }
    CHECK(std::all_of(seen, seen + 64, [](bool s) { return s; }));
  }
}

TEST(both_nf4_tables_are_the_one_table) {
  for (int code = 0; code < 16; ++code) {
    CHECK(cuda::nf4_half(code) == float_to_f16(kNf4Table[code]));
    CHECK(cuda::nf4_value(code) == kNf4Table[code]);
  }
}

TEST(single_weights_decode_as_the_layout_says) {
  for (BlockFormat format : kFormats) {
    const auto matrix = random_matrix(format, 19, 71);
    const int64_t tiles = cuda::tiles_in_row(format, 71);
    for (int64_t row = 0; row < 19; ++row) {
      for (int64_t col = 0; col < 71; ++col) {
        const double expected = decoded(matrix->view, row, col);
        CHECK(std::fabs(cuda::weight_at(matrix->view, tiles, row, col) - expected) <=
              1e-6 * std::fabs(expected) + 1e-7);
      }
    }
  }
}

// Every code value in every place of a tile, as the tensor cores get it.
TEST(int4_and_int8_codes_reach_the_tensor_cores_exactly) {
  for (BlockFormat format : {BlockFormat::int4, BlockFormat::int8}) {
    const int64_t rows = 16, cols = 64;
    Quantised matrix(format, rows, cols);
    auto* codes = matrix.codes.as<uint8_t>();
    for (int64_t i = 0; i < codes_bytes(format, rows, cols); ++i) codes[i] = static_cast<uint8_t>(i * 37 + i / 256);
    const int64_t per_tile = format == BlockFormat::int4 ? 16 : 8;
    for (int64_t i = 0; i < scales_bytes(format, rows, cols) / 2; ++i) {
      matrix.scales.as<uint16_t>()[i] = float_to_f16(i % per_tile < 8 ? 0.25f * (1 + i % 3) : -0.5f * (i % 5));
    }
    std::vector<float> unit(cols * cols, 0.0f), unit_rows(rows * rows, 0.0f);
    for (int64_t i = 0; i < cols; ++i) unit[i * cols + i] = 1.0f;
    for (int64_t i = 0; i < rows; ++i) unit_rows[i * rows + i] = 1.0f;
    const auto by_column = product({}, matrix.view, Direction::forward, Precision::fast, unit, cols, nullptr);
    const auto by_row = product({}, matrix.view, Direction::grad, Precision::fast, unit_rows, rows, nullptr);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = 0; col < cols; ++col) {
        const double expected = decoded(matrix.view, row, col);
        CHECK_IN(by_column[col * rows + row] == expected, "forward (%ld, %ld)", long(row), long(col));
        CHECK_IN(by_row[row * cols + col] == expected, "grad (%ld, %ld)", long(row), long(col));
      }
    }
  }
}

struct Shape {
  int64_t tokens, rows, cols;
};

std::vector<Shape> odd_shapes() {
  std::vector<Shape> all;
  for (int i = 0; i < kNumOddSizes; ++i) {
    all.push_back({kOddSizes[(i * 4) % kNumOddSizes], kOddSizes[i], kOddSizes[(i + 9) % kNumOddSizes]});
  }
  all.push_back({129, 300, 70});  // several blocks both ways
  all.push_back({5, 40, 1100});   // a split sum
  all.push_back({17, 900, 40});   // a split sum the other way
  return all;
}

void check_shape(BlockFormat format, const Shape& s) {
  const auto matrix = random_matrix(format, s.rows, s.cols);
  const std::vector<float> x = normal(s.tokens * s.cols, 1), g = normal(s.tokens * s.rows, 2), bias = normal(s.rows, 3);
  const auto forward = forward_oracle(matrix->view, x, s.tokens, bias.data());
  const auto grad = grad_input_oracle(matrix->view, g, s.tokens);
  Device device;
  device.num_processors = 16;
  const auto errors = [&](Precision precision, double* out) {
    out[0] = relative_error(
        product(device, matrix->view, Direction::forward, precision, x, s.tokens, bias.data()).data(), forward);
    out[1] =
        relative_error(product(device, matrix->view, Direction::grad, precision, g, s.tokens, nullptr).data(), grad);
  };
  double exact[2], fast[2], library[2];
  errors(Precision::exact, exact);
  errors(Precision::fast, fast);
  device.library = the_library();
  device.library_from_tokens = 1;
  errors(Precision::fast, library);
  const double budget = cuda::is_tiled(format) ? kFusedBudget : kExactBudget;
  CHECK_IN(std::max(exact[0], exact[1]) < kExactBudget && std::max(fast[0], fast[1]) < budget &&
               std::max(library[0], library[1]) < kLibraryBudget,
           "%s M=%ld N=%ld K=%ld: exact %.1e %.1e fast %.1e %.1e library %.1e %.1e", block_format_name(format),
           long(s.tokens), long(s.rows), long(s.cols), exact[0], exact[1], fast[0], fast[1], library[0], library[1]);
}

TEST(products_match_float64_at_odd_sizes) {
  for (BlockFormat format : kFormats) {
    for (const Shape& shape : odd_shapes()) check_shape(format, shape);
  }
}

// The decoded scratch is bf16 of the exact weight, zero in the padding, for every format and part of a matrix.
TEST(rows_decode_to_bf16_with_zeros_behind_them) {
  for (BlockFormat format : kFormats) {
    const int64_t rows = 27, cols = 75, stride = 80;
    const auto matrix = random_matrix(format, rows, cols);
    for (int64_t begin : {0, 8}) {
      Buffer out((rows - begin) * stride * 2);
      cuda::decode_rows(nullptr, matrix->view, begin, rows, stride, out.as<uint16_t>());
      CHECK(out.guard_intact());
      for (int64_t row = begin; row < rows; ++row) {
        for (int64_t col = 0; col < stride; ++col) {
          const float got = bf16_to_float(out.as<uint16_t>()[(row - begin) * stride + col]);
          const double expected = col < cols ? decoded(matrix->view, row, col) : 0.0;
          CHECK_IN(std::fabs(got - expected) <= std::fabs(expected) / 256, "%s (%ld, %ld)", block_format_name(format),
                   long(row), long(col));
        }
      }
    }
  }
}

// What cuBLASLt wants of addresses is kept for any that a caller may bring: the fake refuses others.
TEST(a_bias_and_a_workspace_of_any_alignment_do) {
  const auto matrix = random_matrix(BlockFormat::int4, 40, 64);
  const std::vector<float> x = normal(3 * 64, 1), bias = normal(44, 2);
  Device device;
  device.library = the_library();
  device.library_from_tokens = 1;
  for (int shift = 0; shift < 4; ++shift) {
    const auto out = product(device, matrix->view, Direction::forward, Precision::fast, x, 3, bias.data() + shift);
    CHECK(relative_error(out.data(), forward_oracle(matrix->view, x, 3, bias.data() + shift)) < kLibraryBudget);
  }
}

TEST(a_launch_that_no_device_would_take_is_refused) {
  const std::vector<float> rows(30000);
  const BottleneckView wide{1, rows.data(), rows.data(), rows.data(), rows.data()};
  CHECK_THROWS(InvalidArgument,
               cuda::boundary_encode(nullptr, {rows.data(), 1, 30000, wide, CacheFormat::f32, nullptr, 120000}));
  CHECK_THROWS(InvalidArgument, cuda::launch<cuda::ToBf16>(nullptr, {1, 65536, 1}, {}));
}

TEST(results_do_not_depend_on_the_order_of_threads) {
  using cuda::emulator::Schedule;
  const auto matrix = random_matrix(BlockFormat::nf4, 72, 200);
  const std::vector<float> x = normal(20 * 200, 1);
  const auto expected = product({}, matrix->view, Direction::forward, Precision::fast, x, 20, nullptr);
  const auto exact = product({}, matrix->view, Direction::forward, Precision::exact, x, 20, nullptr);
  for (Schedule schedule : {Schedule::descending, Schedule::shuffled}) {
    cuda::emulator::set_schedule(schedule);
    CHECK(product({}, matrix->view, Direction::forward, Precision::fast, x, 20, nullptr) == expected);
    CHECK(product({}, matrix->view, Direction::forward, Precision::exact, x, 20, nullptr) == exact);
  }
  cuda::emulator::set_schedule(Schedule::ascending);
}

TEST(a_nan_or_inf_input_makes_its_own_row_nan_and_no_other) {
  for (BlockFormat format : {BlockFormat::int4, BlockFormat::nf4, BlockFormat::int8}) {
    const auto matrix = random_matrix(format, 21, 70);
    for (float bad : {NAN, INFINITY, -INFINITY}) {
      std::vector<float> x = normal(9 * 70, 6);
      x[4 * 70 + 69] = bad;
      const auto out = product({}, matrix->view, Direction::forward, Precision::fast, x, 9, nullptr);
      for (int64_t i = 0; i < 9 * 21; ++i) CHECK(std::isnan(out[i]) == (i / 21 == 4));
    }
  }
}

TEST(rows_of_any_size_keep_their_precision) {
  const auto matrix = random_matrix(BlockFormat::int4, 24, 96);
  for (float size : {1e-37f, 1e-20f, 1e-6f, 1e6f, 1e30f}) {
    std::vector<float> x = normal(3 * 96, 8);
    for (float& value : x) value *= size;
    const auto out = product({}, matrix->view, Direction::forward, Precision::fast, x, 3, nullptr);
    CHECK_IN(relative_error(out.data(), forward_oracle(matrix->view, x, 3, nullptr)) < kFusedBudget, "%g", size);
  }
}

TEST(accumulate_adds_to_what_is_there) {
  for (Precision precision : {Precision::exact, Precision::fast}) {
    for (int processors : {1, 32}) {
      const auto matrix = random_matrix(BlockFormat::int4, 600, 40);
      const std::vector<float> g = normal(7 * 600, 2);
      Device device;
      device.num_processors = processors;
      const auto plain = product(device, matrix->view, Direction::grad, precision, g, 7, nullptr);
      const auto sum = product(device, matrix->view, Direction::grad, precision, g, 7, nullptr, true, 1.0f);
      for (size_t i = 0; i < sum.size(); ++i) CHECK(std::fabs(sum[i] - 1.0f - plain[i]) < 1e-4f);
    }
  }
}

TEST(code_runs_on_its_major_version_and_the_newest_on_what_is_newer) {
  const char* all = "80,87,89,90";
  for (int architecture : {80, 86, 87, 89, 90, 100, 120}) CHECK(cuda::runs_on(all, architecture));
  CHECK(!cuda::runs_on(all, 75));
  CHECK(cuda::runs_on("87", 89) && cuda::runs_on("87", 90) && !cuda::runs_on("87", 86) && !cuda::runs_on("87", 80));
  CHECK(!cuda::runs_on("80,90", 75) && cuda::runs_on("80,90", 89) && !cuda::runs_on("90", 87) &&
        !cuda::runs_on("", 90));
}

TEST(the_crossover_of_an_architecture_is_that_of_the_row_below_it) {
  CHECK(cuda::crossover_of(80) == 768 && cuda::crossover_of(90) == 512 && cuda::crossover_of(120) == 512);
  for (int architecture : {75, 86, 87, 89}) CHECK(cuda::crossover_of(architecture) == cuda::kNever);
}

// The emulator would notice: copies that nobody waited for, and barriers that not all threads reach.
struct WithoutWait {
  struct Args {
    const unsigned char* from;
    int* first;
  };
  static constexpr int kThreads = 32, kMinBlocks = 1, kSharedBytes = 512;
  static void run(const Args& a, unsigned char* shared) {
    cuda::copy_async16(shared + cuda::thread_index() * 16, a.from, true);
    cuda::copy_async_commit();
    if (cuda::thread_index() == 0) *a.first = shared[0];
  }
};
struct DivergentBarrier {
  struct Args {};
  static constexpr int kThreads = 64, kMinBlocks = 1, kSharedBytes = 0;
  static void run(const Args&, unsigned char*) {
    if (cuda::thread_index() < 40) cuda::sync_threads();
  }
};

TEST(the_emulator_sees_missing_waits_and_divergent_barriers) {
  alignas(16) unsigned char data[16] = {7};
  int first = 0;
  cuda::launch<WithoutWait>(nullptr, {1, 1, 1}, {data, &first});
  CHECK(first == 0xFF);
  CHECK_THROWS(Error, cuda::launch<DivergentBarrier>(nullptr, {1, 1, 1}, {}));
}

// Formats: layout, quantising, decoding, taking over GGUF blocks.
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "base/thread_pool.h"
#include "chainfed/error.h"
#include "check.h"
#include "matrices.h"
#include "quant/lanes-inl.h"

using namespace testing;

TEST(sizes_match_the_layout_text) {
  CHECK(codes_bytes(BlockFormat::int4, 9, 33) == 2 * 2 * 128 && scales_bytes(BlockFormat::int4, 9, 33) == 2 * 2 * 32);
  CHECK(codes_bytes(BlockFormat::nf4, 8, 33) == 2 * 128 && scales_bytes(BlockFormat::nf4, 8, 33) == 32);
  CHECK(codes_bytes(BlockFormat::int8, 8, 32) == 256 && scales_bytes(BlockFormat::int8, 8, 32) == 16);
  CHECK(codes_bytes(BlockFormat::bf16, 3, 5) == 30 && scales_bytes(BlockFormat::bf16, 3, 5) == 0);
  CHECK(codes_bytes(BlockFormat::f32, 3, 5) == 60);
  constexpr int64_t kHuge = int64_t{1} << 62;
  for (BlockFormat format : kFormats) {
    CHECK_THROWS(InvalidArgument, codes_bytes(format, 0, 4));
    CHECK_THROWS(InvalidArgument, scales_bytes(format, 4, -1));
    CHECK_THROWS(InvalidArgument, codes_bytes(format, kHuge, kHuge));
    CHECK_THROWS(InvalidArgument, codes_bytes(format, std::numeric_limits<int64_t>::max(), 2));
    CHECK(parse_block_format(block_format_name(format)) == format);
  }
  CHECK_THROWS(InvalidArgument, parse_block_format("int5"));
}

TEST(every_level_quantises_to_the_same_bits) {
  for (BlockFormat format : kFormats) {
    for (int64_t rows : {1, 8, 13}) {
      for (int64_t cols : kOddSizes) {
        const std::vector<float> weight = normal(rows * cols, static_cast<uint32_t>(cols));
        set_simd_level(SimdLevel::scalar);
        const auto expected = quantised(format, rows, cols, weight);
        for (SimdLevel level : levels()) {
          set_simd_level(level);
          const auto got = quantised(format, rows, cols, weight);
          CHECK(std::memcmp(got->view.codes, expected->view.codes, codes_bytes(format, rows, cols)) == 0);
          CHECK(std::memcmp(got->view.scales, expected->view.scales, scales_bytes(format, rows, cols)) == 0);
          CHECK(got->codes.guard_intact() && got->scales.guard_intact());
        }
      }
    }
  }
  reset_simd_level();
}

TEST(every_level_decodes_what_the_layout_says) {
  for (BlockFormat format : kFormats) {
    for (int64_t rows : kOddSizes) {
      for (int64_t cols : {int64_t{1}, int64_t{31}, int64_t{32}, int64_t{65}, int64_t{129}}) {
        const auto matrix = random_matrix(format, rows, cols);
        for (SimdLevel level : levels()) {
          set_simd_level(level);
          for (int64_t begin : {int64_t{0}, rows / 2}) {
            Buffer out((rows - begin) * cols * 4);
            dequantize_rows(matrix->view, begin, rows, out.as<float>());
            bool equal = true;
            for (int64_t i = 0; i < (rows - begin) * cols; ++i) {
              const double expected = decoded(matrix->view, begin + i / cols, i % cols);
              equal = equal && out.as<float>()[i] == static_cast<float>(expected);
            }
            CHECK_IN(equal && out.guard_intact(), "%s %s [%ld, %ld] from %ld", block_format_name(format),
                     simd_level_name(level), long(rows), long(cols), long(begin));
          }
        }
      }
    }
  }
  reset_simd_level();
}

TEST(gathered_rows_equal_decoded_rows) {
  const std::vector<int64_t> ids = {12, 0, 5, 5, 7, 8};
  for (BlockFormat format : kFormats) {
    const auto matrix = random_matrix(format, 13, 67);
    Buffer out(static_cast<int64_t>(ids.size()) * 67 * 4);
    gather_rows(matrix->view, ids.data(), static_cast<int64_t>(ids.size()), out.as<float>());
    for (size_t i = 0; i < ids.size() * 67; ++i) {
      CHECK(out.as<float>()[i] == static_cast<float>(decoded(matrix->view, ids[i / 67], i % 67)));
    }
    CHECK(out.guard_intact());
  }
}

double squared_error(const Quantised& matrix, const std::vector<float>& weight) {
  const std::vector<double> values = decoded_all(matrix.view);
  double sum = 0.0;
  for (size_t i = 0; i < weight.size(); ++i) sum += (values[i] - weight[i]) * (values[i] - weight[i]);
  return sum / static_cast<double>(weight.size());
}

TEST(the_search_rounds_scales_as_f16_stores_them) {
  // All exponents and signs, mantissas around each place where a rounding turns.
  for (uint64_t high = 0; high < (1 << 16); ++high) {
    for (const uint32_t low : {0x0000u, 0x0001u, 0x0FFFu, 0x1000u, 0x1001u, 0x7FFFu, 0x8000u, 0xFFFFu}) {
      const auto bits = static_cast<uint32_t>(high << 16 | low);
      float value;
      std::memcpy(&value, &bits, sizeof value);
      if (value != value) continue;
      Lanes rounded = {value, value, value, value, value, value, value, value};
      round_to_f16(rounded);
      const float expected = f16_to_float(float_to_f16(value));
      CHECK(rounded[0] == expected && std::signbit(rounded[7]) == std::signbit(expected));
    }
  }
}

TEST(int4_search_beats_the_plain_range) {
  const int64_t rows = 64, cols = 512;
  const std::vector<float> weight = normal(rows * cols, 3);
  double plain = 0.0;
  for (int64_t block = 0; block < rows * cols / 32; ++block) {
    const float* w = weight.data() + block * 32;
    float low = w[0], high = w[0];
    for (int i = 0; i < 32; ++i) low = std::fmin(low, w[i]), high = std::fmax(high, w[i]);
    const float scale = f16_to_float(float_to_f16((high - low) / 15)), offset = f16_to_float(float_to_f16(low));
    for (int i = 0; i < 32; ++i) {
      const float q = std::fmin(15.0f, std::fmax(0.0f, std::nearbyint((w[i] - offset) / scale)));
      const double difference = w[i] - (static_cast<double>(scale) * q + offset);
      plain += difference * difference / static_cast<double>(rows * cols);
    }
  }
  // Normal weights: the search is measured to remove about 15 % of the squared error.
  CHECK(squared_error(*quantised(BlockFormat::int4, rows, cols, weight), weight) < 0.90 * plain);
}

TEST(a_constant_block_and_zeros_come_back) {
  for (BlockFormat format : kFormats) {
    for (float value : {0.0f, 0.5f, -3.0f}) {
      const std::vector<float> weight(8 * 64, value);
      const auto matrix = quantised(format, 8, 64, weight);
      for (double w : decoded_all(matrix->view)) CHECK(std::fabs(w - value) <= 1e-3 * std::fabs(value));
    }
  }
}

TEST(nf4_codes_are_the_nearest_entries) {
  const std::vector<float> weight = normal(8 * 128, 5);
  const auto matrix = quantised(BlockFormat::nf4, 8, 128, weight);
  for (int64_t row = 0; row < 8; ++row) {
    for (int64_t col = 0; col < 128; ++col) {
      const float absmax = static_cast<const float*>(matrix->view.scales)[col / 64 * 8 + row];
      double nearest = 10.0;
      for (float entry : kNf4Table) {
        nearest = std::fmin(nearest, std::fabs(static_cast<double>(weight[row * 128 + col]) / absmax - entry));
      }
      const double distance = std::fabs(decoded(matrix->view, row, col) - weight[row * 128 + col]) / absmax;
      CHECK(distance <= nearest + 1e-6);
    }
  }
}

TEST(weights_that_cannot_be_stored_are_refused_by_name) {
  for (BlockFormat format : kFormats) {
    for (float bad : {NAN, INFINITY, -INFINITY}) {
      std::vector<float> weight(20 * 40, 1.0f);
      weight[13 * 40 + 39] = bad;
      std::string message;
      try {
        quantised(format, 20, 40, weight);
      } catch (const InvalidArgument& error) {
        message = error.what();
      }
      CHECK(message.find("row 13, column 39") != std::string::npos);
    }
  }
  const std::vector<float> large(64, 3e38f);
  CHECK_THROWS(InvalidArgument, quantised(BlockFormat::int4, 1, 64, large));
  CHECK_THROWS(InvalidArgument, quantised(BlockFormat::int8, 1, 64, large));
  CHECK(decoded(quantised(BlockFormat::nf4, 1, 64, large)->view, 0, 0) == static_cast<double>(3e38f));
}

TEST(gguf_blocks_are_taken_over_without_loss) {
  std::mt19937 engine(1);
  for (int64_t rows : {1, 8, 11}) {
    const int64_t cols = 96, blocks = cols / 32;
    std::vector<uint8_t> q4(rows * blocks * kQ41BlockBytes), q8(rows * blocks * kQ80BlockBytes);
    for (uint8_t& byte : q4) byte = static_cast<uint8_t>(engine());
    for (uint8_t& byte : q8) byte = static_cast<uint8_t>(engine());
    for (int64_t b = 0; b < rows * blocks; ++b) {  // finite scales
      q4[b * kQ41BlockBytes + 1] &= 0x3F, q4[b * kQ41BlockBytes + 3] &= 0x3F, q8[b * kQ80BlockBytes + 1] &= 0x3F;
    }
    Quantised int4(BlockFormat::int4, rows, cols), int8(BlockFormat::int8, rows, cols);
    repack_q4_1(q4.data(), rows, cols, int4.codes.as<uint8_t>(), int4.scales.as<uint16_t>());
    repack_q8_0(q8.data(), rows, cols, int8.codes.as<int8_t>(), int8.scales.as<uint16_t>());
    for (int64_t i = 0; i < rows * cols; ++i) {
      const uint8_t* b4 = q4.data() + i / 32 * kQ41BlockBytes;
      const uint8_t* b8 = q8.data() + i / 32 * kQ80BlockBytes;
      uint16_t d4, m4, d8;
      std::memcpy(&d4, b4, 2), std::memcpy(&m4, b4 + 2, 2), std::memcpy(&d8, b8, 2);
      const int k = static_cast<int>(i % 32), nibble = k < 16 ? b4[4 + k] & 15 : b4[4 + k - 16] >> 4;
      const double w4 = static_cast<double>(f16_to_float(d4)) * nibble + f16_to_float(m4);
      const double w8 = static_cast<double>(f16_to_float(d8)) * static_cast<int8_t>(b8[2 + k]);
      CHECK(decoded(int4.view, i / cols, i % cols) == w4 && decoded(int8.view, i / cols, i % cols) == w8);
    }
    CHECK(int4.codes.guard_intact() && int4.scales.guard_intact() && int8.codes.guard_intact());
    q4[(rows - 1) * blocks * kQ41BlockBytes + 3] = 0x7C;  // an infinite offset
    CHECK_THROWS(CorruptFile, repack_q4_1(q4.data(), rows, cols, int4.codes.as<uint8_t>(), int4.scales.as<uint16_t>()));
    q8[1] = 0x7E;
    CHECK_THROWS(CorruptFile, repack_q8_0(q8.data(), rows, cols, int8.codes.as<int8_t>(), int8.scales.as<uint16_t>()));
  }
}

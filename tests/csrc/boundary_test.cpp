// Boundary codec and fused adapter at every SIMD level: records bit-equal to the scalar oracle, values within half a
// scale, outliers exact, non-finite input visible after decoding, adapter within 1e-6 of float64.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "base/simd_level.h"
#include "base/thread_pool.h"
#include "boundary/adapter.h"
#include "boundary/record.h"
#include "chainfed/error.h"
#include "chainfed/kernels.h"
#include "check.h"

namespace {

using namespace chainfed;

constexpr int64_t kSizes[] = {1, 2, 7, 63, 64, 65, 100, 128, 191, 256, 320, 576, 1000, 2048, 4099, 8191};
const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInf = std::numeric_limits<float>::infinity();

std::vector<SimdLevel> levels() {
  std::vector<SimdLevel> found;
  for (int i = 0; i <= static_cast<int>(supported_simd_level()); ++i) found.push_back(static_cast<SimdLevel>(i));
  return found;
}

std::vector<float> random_hidden(int64_t num_tokens, int64_t hidden_size, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> hidden(num_tokens * hidden_size);
  for (float& value : hidden) value = normal(random);
  for (int64_t t = 0; t < num_tokens; t += 2) hidden[t * hidden_size + (7 * t) % hidden_size] *= 1000.0f;
  return hidden;
}

std::vector<uint8_t> encode(const std::vector<float>& hidden, int64_t hidden_size, CacheFormat format,
                            const BottleneckView* adapter = nullptr) {
  const int64_t num_tokens = static_cast<int64_t>(hidden.size()) / hidden_size;
  std::vector<uint8_t> records(num_tokens * record_bytes(format, hidden_size), 0xEE);
  boundary_encode(hidden.data(), num_tokens, hidden_size, adapter, format, records.data());
  return records;
}

std::vector<float> decode(const std::vector<uint8_t>& records, int64_t hidden_size, CacheFormat format) {
  const int64_t num_tokens = static_cast<int64_t>(records.size()) / record_bytes(format, hidden_size);
  std::vector<int64_t> rows(num_tokens);
  for (int64_t t = 0; t < num_tokens; ++t) rows[t] = t;
  std::vector<float> out(num_tokens * hidden_size, -7.0f);
  boundary_decode(records.data(), num_tokens, hidden_size, format, rows.data(), out.data());
  return out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Values that exercise ties, zeros, signed zeros, subnormals, huge and non-finite numbers.
std::vector<float> hostile_hidden(int64_t num_tokens, int64_t hidden_size) {
  const float picks[] = {0.0f,   -0.0f, 1.0f,    -1.0f,    1e-42f, -3e-39f, 6e-8f, 65504.0f, 8.3e6f, 8.4e6f,
                         -1e30f, 0.5f,  3.3e38f, -3.4e38f, kInf,   -kInf,   kNan,  1.0f,     1.0f,   127.0f};
  std::mt19937 random(5);
  std::vector<float> hidden(num_tokens * hidden_size);
  for (int64_t t = 0; t < num_tokens; ++t) {
    const uint32_t kinds = 1 + random() % 20;
    for (int64_t d = 0; d < hidden_size; ++d) hidden[t * hidden_size + d] = picks[random() % kinds];
  }
  return hidden;
}

void check_levels_agree(const std::vector<float>& hidden, int64_t hidden_size, CacheFormat format) {
  set_simd_level(SimdLevel::scalar);
  const auto expected_records = encode(hidden, hidden_size, format);
  const auto expected = decode(expected_records, hidden_size, format);
  for (SimdLevel level : levels()) {
    set_simd_level(level);
    CHECK_IN(encode(hidden, hidden_size, format) == expected_records, "records at D=%ld, %s", long(hidden_size),
             simd_level_name(level));
    CHECK_IN(same_bits(decode(expected_records, hidden_size, format), expected), "values at D=%ld, %s",
             long(hidden_size), simd_level_name(level));
  }
}

void check_int8_error(const std::vector<float>& hidden, int64_t hidden_size) {
  const auto records = encode(hidden, hidden_size, CacheFormat::int8);
  const auto decoded = decode(records, hidden_size, CacheFormat::int8);
  const int64_t bytes = record_bytes(CacheFormat::int8, hidden_size);
  for (size_t i = 0; i < hidden.size(); ++i) {
    const int64_t t = static_cast<int64_t>(i) / hidden_size, d = static_cast<int64_t>(i) % hidden_size;
    uint16_t half;
    std::memcpy(&half, &records[t * bytes + scales_offset(hidden_size) + d / kGroupSize * 2], 2);
    const double error = std::fabs(static_cast<double>(decoded[i]) - hidden[i]);
    CHECK_IN(error <= 0.5 * f16_to_float(half) * (1 + 1e-5), "D=%ld token %ld column %ld", long(hidden_size), long(t),
             long(d));
  }
}

// The slots hold exactly the largest magnitudes, the lowest column first among equals.
TEST(largest_magnitudes_are_exact) {
  for (int64_t hidden_size : kSizes) {
    for (const auto& hidden : {random_hidden(9, hidden_size, 9), hostile_hidden(40, hidden_size)}) {
      const int64_t num_tokens = static_cast<int64_t>(hidden.size()) / hidden_size;
      const auto records = encode(hidden, hidden_size, CacheFormat::int8);
      for (int64_t t = 0; t < num_tokens; ++t) {
        const float* row = &hidden[t * hidden_size];
        std::vector<int64_t> order(hidden_size);
        for (int64_t d = 0; d < hidden_size; ++d) order[d] = d;
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
          return (float_bits(row[a]) & kMagnitudeMask) > (float_bits(row[b]) & kMagnitudeMask);
        });
        const uint8_t* slot = &records[t * record_bytes(CacheFormat::int8, hidden_size) + outliers_offset(hidden_size)];
        for (int64_t i = 0; i < num_outliers(hidden_size); ++i, slot += kOutlierBytes) {
          uint16_t column;
          std::memcpy(&column, slot, 2);
          const bool used = (float_bits(row[order[i]]) & kMagnitudeMask) != 0;
          CHECK_IN(column == (used ? order[i] : kUnusedColumn), "D=%ld slot %ld", long(hidden_size), long(i));
          CHECK_IN(!used || std::memcmp(slot + 2, &row[column], 4) == 0, "D=%ld slot %ld", long(hidden_size), long(i));
        }
      }
    }
  }
}

// A non-finite value survives (in a slot) or its group decodes to NaN; finite neighbours stay right or become NaN.
// The group that has the largest magnitude left, 0, has it once: all others of it are taken.
TEST(a_single_zero_left_takes_no_slot) {
  const int64_t hidden_size = 8256, num_tokens = 9;
  std::vector<float> hidden(num_tokens * hidden_size);
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t d = 0; d < kGroupSize; ++d) hidden[t * hidden_size + d] = d == 5 * t ? 0.0f : 1.0f + d;
  }
  check_levels_agree(hidden, hidden_size, CacheFormat::int8);
}

TEST(non_finite_values_stay_visible) {
  for (int64_t hidden_size : kSizes) {
    const auto hidden = hostile_hidden(64, hidden_size);
    for (CacheFormat format : {CacheFormat::int8, CacheFormat::bf16, CacheFormat::f32}) {
      const auto decoded = decode(encode(hidden, hidden_size, format), hidden_size, format);
      for (size_t i = 0; i < hidden.size(); ++i) {
        if (!std::isfinite(hidden[i])) {
          CHECK_IN(!std::isfinite(decoded[i]), "D=%ld", long(hidden_size));
        } else if (format != CacheFormat::int8 && std::isfinite(decoded[i])) {
          CHECK_IN(std::fabs(decoded[i] - hidden[i]) <= std::fabs(hidden[i]) / 256 + 1e-40f, "D=%ld",
                   long(hidden_size));
        } else if (format == CacheFormat::int8) {
          CHECK_IN(!std::isinf(decoded[i]), "a finite value never decodes to infinity");
        }
      }
    }
  }
}

TEST(damaged_outlier_columns_are_ignored) {
  constexpr int64_t kHidden = 130;
  const auto hidden = random_hidden(1, kHidden, 3);
  auto records = encode(hidden, kHidden, CacheFormat::int8);
  const uint16_t outside = kHidden;
  std::memcpy(&records[outliers_offset(kHidden)], &outside, 2);
  for (SimdLevel level : levels()) {
    set_simd_level(level);
    decode(records, kHidden, CacheFormat::int8);  // an out-of-bounds write is the sanitizer's to see
  }
}

TEST(padding_rows_are_left_alone) {
  constexpr int64_t kHidden = 65;
  const auto hidden = random_hidden(2, kHidden, 4);
  const auto records = encode(hidden, kHidden, CacheFormat::f32);
  std::vector<float> out(5 * kHidden, 42.0f);
  const int64_t rows[] = {3, 1};
  boundary_decode(records.data(), 2, kHidden, CacheFormat::f32, rows, out.data());
  for (int64_t d = 0; d < kHidden; ++d) {
    CHECK_IN(out[3 * kHidden + d] == hidden[d] && out[kHidden + d] == hidden[kHidden + d], "column %ld", long(d));
    CHECK_IN(out[d] == 42.0f && out[2 * kHidden + d] == 42.0f && out[4 * kHidden + d] == 42.0f, "column %ld", long(d));
  }
}

struct Adapter {
  std::vector<float> down_weight, down_bias, up_weight, up_bias;
  BottleneckView view;

  Adapter(int64_t width, int64_t hidden_size, uint32_t seed)
      : down_weight(random_hidden(width, hidden_size, seed)),
        down_bias(random_hidden(1, width, seed + 1)),
        up_weight(random_hidden(hidden_size, width, seed + 2)),
        up_bias(random_hidden(1, hidden_size, seed + 3)) {
    for (float& w : down_weight) w = std::remainder(w, 2.0f) / std::sqrt(static_cast<float>(hidden_size));
    for (float& w : up_weight) w = std::remainder(w, 2.0f) / std::sqrt(static_cast<float>(width));
    for (float& b : down_bias) b = std::remainder(b, 2.0f);
    for (float& b : up_bias) b = std::remainder(b, 2.0f);
    view = {width, down_weight.data(), down_bias.data(), up_weight.data(), up_bias.data()};
  }
};

void check_adapter(int64_t num_tokens, int64_t hidden_size, int64_t width) {
  const Adapter adapter(width, hidden_size, 21);
  auto hidden = random_hidden(num_tokens, hidden_size, 22);
  for (float& h : hidden) h = std::remainder(h, 3.0f);
  const auto out = decode(encode(hidden, hidden_size, CacheFormat::f32, &adapter.view), hidden_size, CacheFormat::f32);
  std::vector<double> middle(width);
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t r = 0; r < width; ++r) {
      double sum = adapter.down_bias[r];
      for (int64_t d = 0; d < hidden_size; ++d) {
        sum += static_cast<double>(adapter.down_weight[r * hidden_size + d]) * hidden[t * hidden_size + d];
      }
      middle[r] = 0.5 * sum * std::erfc(-sum * 0.70710678118654752440);
    }
    for (int64_t d = 0; d < hidden_size; ++d) {
      double expected = hidden[t * hidden_size + d] + static_cast<double>(adapter.up_bias[d]);
      for (int64_t r = 0; r < width; ++r) expected += static_cast<double>(adapter.up_weight[d * width + r]) * middle[r];
      const double got = out[t * hidden_size + d];
      CHECK_IN(std::fabs(got - expected) <= 2e-6 * (1 + std::fabs(expected)), "D=%ld R=%ld: %.9g, expected %.9g",
               long(hidden_size), long(width), got, expected);
    }
  }
}

TEST(adapter_matches_float64) {
  for (SimdLevel level : levels()) {
    set_simd_level(level);
    check_adapter(1, 1, 1);
    check_adapter(17, 65, 3);
    check_adapter(33, 576, 64);
    check_adapter(3, 1000, 257);
    check_adapter(2, 4099, 9);
  }
}

TEST(a_token_does_not_depend_on_its_neighbours_or_threads) {
  constexpr int64_t kHidden = 200, kTokens = 37;
  const Adapter adapter(24, kHidden, 31);
  const auto hidden = random_hidden(kTokens, kHidden, 32);
  const int64_t bytes = record_bytes(CacheFormat::int8, kHidden);
  for (SimdLevel level : levels()) {
    set_simd_level(level);
    set_num_threads(1);
    const auto expected = encode(hidden, kHidden, CacheFormat::int8, &adapter.view);
    set_num_threads(3);
    CHECK_IN(encode(hidden, kHidden, CacheFormat::int8, &adapter.view) == expected, "%s", simd_level_name(level));
    for (int64_t t = 0; t < kTokens; ++t) {
      const std::vector<float> one(hidden.begin() + t * kHidden, hidden.begin() + (t + 1) * kHidden);
      const auto record = encode(one, kHidden, CacheFormat::int8, &adapter.view);
      CHECK_IN(std::memcmp(record.data(), &expected[t * bytes], bytes) == 0, "token %ld", long(t));
    }
  }
  set_num_threads(2);
}

TEST(adapter_passes_non_finite_values_on) {
  constexpr int64_t kHidden = 70;
  const Adapter adapter(5, kHidden, 41);
  auto hidden = random_hidden(2, kHidden, 42);
  hidden[3] = kNan;
  for (SimdLevel level : levels()) {
    set_simd_level(level);
    const auto out = decode(encode(hidden, kHidden, CacheFormat::int8, &adapter.view), kHidden, CacheFormat::int8);
    for (int64_t d = 0; d < kHidden; ++d) {
      CHECK_IN(std::isnan(out[d]) && std::isfinite(out[kHidden + d]), "column %ld", long(d));
    }
  }
}

TEST(sizes_outside_the_format_are_refused) {
  const auto refused = [](CacheFormat format, int64_t hidden_size) {
    try {
      record_bytes(format, hidden_size);
    } catch (const InvalidArgument&) {
      return true;
    }
    return false;
  };
  CHECK_IN(refused(CacheFormat::int8, 0) && refused(CacheFormat::f32, -1) && refused(CacheFormat::int8, 65536),
           "bounds");
  CHECK_IN(!refused(CacheFormat::int8, 65535) && !refused(CacheFormat::bf16, 65536), "bounds");
  CHECK_IN(record_bytes(CacheFormat::int8, 576) == 576 + 18 + 24, "layout");
  CHECK_IN(record_bytes(CacheFormat::int8, 65) == 128 + 4 + 6, "layout");
}

TEST(every_level_gives_the_same_bits) {
  for (int64_t hidden_size : kSizes) {
    const auto normal = random_hidden(9, hidden_size, 1);
    const auto hostile = hostile_hidden(40, hidden_size);
    for (CacheFormat format : {CacheFormat::int8, CacheFormat::bf16, CacheFormat::f32}) {
      check_levels_agree(normal, hidden_size, format);
      check_levels_agree(hostile, hidden_size, format);
    }
  }
}

TEST(int8_values_are_within_half_a_scale) {
  for (int64_t hidden_size : kSizes) check_int8_error(random_hidden(9, hidden_size, 1), hidden_size);
}

}  // namespace

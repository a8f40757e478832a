// Boundary records on a device: the same bytes as the CPU's (boundary/record.h holds the arithmetic for both). One
// token a block when there is no adapter; with one, a block takes `tokens_at_once` tokens, applies h +
// up(gelu(down(h))) in f32 to them in shared memory and encodes what comes out.
#pragma once
#include <cstdint>

#include "boundary/record.h"
#include "chainfed/kernels.h"
#include "cuda/prepare.h"

namespace chainfed::cuda {

struct EncodeArgs : EncodeCall {
  int64_t tokens_at_once;
};

struct Encode {
  using Args = EncodeArgs;
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 0;
  static constexpr int kMaxTokens = 8, kWarps = kThreads / kWarp;
  static constexpr int64_t kSharedTarget = 64 << 10;

  static int64_t scratch_bytes(int64_t hidden_size) {
    return round_up16(12 * num_groups(hidden_size) + 2 * num_outliers(hidden_size));
  }
  // How many tokens share a block: their rows must lie in its shared memory.
  static int64_t tokens_of_block(int64_t hidden_size, int64_t width) {
    if (width == 0) return 1;
    const int64_t fit = (kSharedTarget - scratch_bytes(hidden_size)) / (4 * (hidden_size + width));
    return fit < 1 ? 1 : fit > kMaxTokens ? kMaxTokens : fit;
  }
  static int shared_bytes(int64_t hidden_size, int64_t width) {
    const int64_t rows = width == 0 ? 0 : tokens_of_block(hidden_size, width) * 4 * (hidden_size + width);
    return static_cast<int>(scratch_bytes(hidden_size) + rows);
  }
  static Grid grid(const Args& a) { return {(a.num_tokens + a.tokens_at_once - 1) / a.tokens_at_once, 1, 1}; }

  CHAINFED_DEVICE static void run(const Args& a, unsigned char* shared) {
    const int64_t first = block_x() * a.tokens_at_once, D = a.hidden_size;
    const int64_t left = a.num_tokens - first, count = left < a.tokens_at_once ? left : a.tokens_at_once;
    auto* rows = reinterpret_cast<float*>(shared + round_up16(12 * num_groups(D) + 2 * num_outliers(D)));
    const float* source = a.hidden + first * D;
    if (a.adapter.width > 0) {
      adapt(a, source, count, rows);
      source = rows;
    }
    for (int64_t t = 0; t < count; ++t) {
      uint8_t* record = a.records + (first + t) * a.record_bytes;
      if (a.format == CacheFormat::int8) {
        encode_int8(source + t * D, D, record, shared);
        sync_threads();  // the scratch is used again
      } else {
        encode_plain(a.format, source + t * D, D, record);
      }
    }
  }

 private:
  CHAINFED_HOST_DEVICE static int64_t round_up16(int64_t bytes) { return (bytes + 15) / 16 * 16; }

  // rows[t] = h + up(gelu(down(h))). A warp a row of down, then a thread a column of the result.
  CHAINFED_DEVICE static void adapt(const Args& a, const float* hidden, int64_t count, float* rows) {
    const int64_t D = a.hidden_size, R = a.adapter.width;
    float* middle = rows + a.tokens_at_once * D;
    for (int64_t i = thread_index(); i < count * D; i += kThreads) rows[i] = hidden[i];
    sync_threads();
    const int lane = thread_index() % kWarp;
    for (int64_t r = thread_index() / kWarp; r < R; r += kWarps) {
      float sums[kMaxTokens] = {};
      for (int64_t d = lane; d < D; d += kWarp) {
        const float weight = a.adapter.down_weight[r * D + d];
        CHAINFED_UNROLL
        for (int t = 0; t < kMaxTokens; ++t) {
          if (t < count) sums[t] = multiply_add(weight, rows[t * D + d], sums[t]);
        }
      }
      CHAINFED_UNROLL
      for (int t = 0; t < kMaxTokens; ++t) {
        if (t >= count) continue;
        const float x = warp_sum(sums[t]) + a.adapter.down_bias[r];
        if (lane == 0) middle[t * R + r] = 0.5f * x * complementary_erf(-0.70710678118654752f * x);
      }
    }
    sync_threads();
    for (int64_t d = thread_index(); d < D; d += kThreads) {
      float sums[kMaxTokens] = {};
      for (int64_t r = 0; r < R; ++r) {
        const float weight = a.adapter.up_weight[d * R + r];
        CHAINFED_UNROLL
        for (int t = 0; t < kMaxTokens; ++t) {
          if (t < count) sums[t] = multiply_add(weight, middle[t * R + r], sums[t]);
        }
      }
      CHAINFED_UNROLL
      for (int t = 0; t < kMaxTokens; ++t) {
        if (t < count) rows[t * D + d] += sums[t] + a.adapter.up_bias[d];
      }
    }
    sync_threads();
  }

  CHAINFED_DEVICE static void encode_plain(CacheFormat format, const float* row, int64_t D, uint8_t* record) {
    for (int64_t i = thread_index(); i < D; i += kThreads) {
      const uint32_t bits = format == CacheFormat::bf16 ? float_to_bf16(row[i]) : float_bits(row[i]);
      const int size = format == CacheFormat::bf16 ? 2 : 4;
      for (int byte = 0; byte < size; ++byte) record[i * size + byte] = static_cast<uint8_t>(bits >> 8 * byte);
    }
  }

  // Bits of the magnitude at a column; 0 beyond the row.
  CHAINFED_DEVICE static uint32_t magnitude(const float* row, int64_t D, int64_t column) {
    return column < D ? float_bits(row[column]) & kMagnitudeMask : 0u;
  }

  CHAINFED_DEVICE static void encode_int8(const float* row, int64_t D, uint8_t* record, unsigned char* shared) {
    const int64_t groups = num_groups(D);
    auto* max_bits = reinterpret_cast<uint32_t*>(shared);  // of each group without its outliers
    uint32_t* taken = max_bits + groups;                   // [groups][2], a bit for each outlier
    auto* columns = reinterpret_cast<uint16_t*>(taken + 2 * groups);
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    for (int64_t g = warp; g < groups; g += kWarps) {
      const uint32_t low = magnitude(row, D, g * kGroupSize + lane);
      const uint32_t high = magnitude(row, D, g * kGroupSize + 32 + lane);
      const uint32_t largest = warp_max(low > high ? low : high);
      if (lane == 0) {
        max_bits[g] = largest;
        taken[2 * g] = taken[2 * g + 1] = 0;
      }
    }
    for (int64_t i = thread_index(); i < num_outliers(D); i += kThreads) columns[i] = kUnusedColumn;
    sync_threads();
    if (warp == 0) take_outliers(row, D, max_bits, taken, columns);
    sync_threads();
    for (int64_t g = warp; g < groups; g += kWarps) write_group(row, D, g, max_bits[g], taken + 2 * g, record);
    for (int64_t i = thread_index(); i < num_outliers(D); i += kThreads) write_outlier(row, D, i, columns[i], record);
  }

  // The largest magnitude out of the row, slot after slot: the lowest group and column among equals. One warp.
  CHAINFED_DEVICE static void take_outliers(const float* row, int64_t D, uint32_t* max_bits, uint32_t* taken,
                                            uint16_t* columns) {
    const int lane = thread_index() % kWarp;
    const int64_t groups = num_groups(D);
    for (int64_t slot = 0; slot < num_outliers(D); ++slot) {
      uint32_t best = 0, at = 0xFFFFFFFFu;
      for (int64_t g = lane; g < groups; g += kWarp) {
        if (max_bits[g] > best) {
          best = max_bits[g];
          at = static_cast<uint32_t>(g);
        }
      }
      const uint32_t largest = warp_max(best);
      if (largest == 0) return;  // only zeros are left: the slots stay unused
      const uint32_t group = warp_min(best == largest ? at : 0xFFFFFFFFu);
      const int64_t column = static_cast<int64_t>(group) * kGroupSize + lane;
      uint32_t low = (taken[2 * group] >> lane & 1) != 0 ? 0 : magnitude(row, D, column);
      uint32_t high = (taken[2 * group + 1] >> lane & 1) != 0 ? 0 : magnitude(row, D, column + 32);
      const uint32_t candidate = low == largest    ? static_cast<uint32_t>(lane)
                                 : high == largest ? static_cast<uint32_t>(lane) + 32
                                                   : 0xFFFFFFFFu;
      const uint32_t place = warp_min(candidate);
      if (place == static_cast<uint32_t>(lane)) low = 0;
      if (place == static_cast<uint32_t>(lane) + 32) high = 0;
      const uint32_t rest = warp_max(low > high ? low : high);
      if (lane == 0) {
        columns[slot] = static_cast<uint16_t>(group * kGroupSize + place);
        taken[2 * group + (place >> 5)] |= 1u << (place & 31);
        max_bits[group] = rest;
      }
      sync_warp();
    }
  }

  CHAINFED_DEVICE static void write_group(const float* row, int64_t D, int64_t g, uint32_t max_bits,
                                          const uint32_t* taken, uint8_t* record) {
    const int lane = thread_index() % kWarp;
    const GroupScale scale = group_scale(max_bits);
    for (int half = 0; half < 2; ++half) {
      const int64_t column = g * kGroupSize + half * 32 + lane;
      const bool is_zero = scale.inverse == 0.0f || column >= D || (taken[half] >> lane & 1) != 0;
      const float code = is_zero ? 0.0f : round_even(exact_mul(row[column], scale.inverse));
      record[column] = static_cast<uint8_t>(code >= -127.0f && code <= 127.0f ? static_cast<int>(code) : 0);
    }
    if (lane < 2) record[scales_offset(D) + 2 * g + lane] = static_cast<uint8_t>(scale.half >> 8 * lane);
  }

  CHAINFED_DEVICE static void write_outlier(const float* row, int64_t D, int64_t slot, uint16_t column,
                                            uint8_t* record) {
    uint8_t* to = record + outliers_offset(D) + slot * kOutlierBytes;
    const uint32_t bits = column == kUnusedColumn ? 0u : float_bits(row[column]);
    for (int i = 0; i < 2; ++i) to[i] = static_cast<uint8_t>(column >> 8 * i);
    for (int i = 0; i < 4; ++i) to[2 + i] = static_cast<uint8_t>(bits >> 8 * i);
  }
};

// out[out_rows[t]] = decode(records[t]), one token a block.
struct Decode {
  using Args = DecodeCall;
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 0;
  static Grid grid(int64_t num_tokens) { return {num_tokens, 1, 1}; }

  CHAINFED_DEVICE static void run(const Args& a, unsigned char*) {
    const uint8_t* record = a.records + block_x() * a.record_bytes;
    const int64_t out_row = a.out_rows[block_x()];
    if (out_row < 0 || out_row >= a.num_rows) return;
    float* row = a.out + out_row * a.hidden_size;
    for (int64_t i = thread_index(); i < a.hidden_size; i += kThreads) row[i] = value(a, record, i);
    if (a.format != CacheFormat::int8) return;
    sync_threads();
    for (int64_t slot = thread_index(); slot < num_outliers(a.hidden_size); slot += kThreads) {
      const uint8_t* from = record + outliers_offset(a.hidden_size) + slot * kOutlierBytes;
      const int64_t column = word(from, 2);
      // A damaged record may name a column twice, or one outside the row: the last slot counts, the row's end too.
      if (column < a.hidden_size && !named_later(record, a.hidden_size, slot, column))
        row[column] = bits_float(word(from + 2, 4));
    }
  }

 private:
  CHAINFED_DEVICE static uint32_t word(const uint8_t* bytes, int count) {
    uint32_t value = 0;
    for (int i = 0; i < count; ++i) value |= static_cast<uint32_t>(bytes[i]) << 8 * i;
    return value;
  }

  CHAINFED_DEVICE static float value(const Args& a, const uint8_t* record, int64_t i) {
    if (a.format == CacheFormat::f32) return bits_float(word(record + 4 * i, 4));
    if (a.format == CacheFormat::bf16) return bf16_to_float(static_cast<uint16_t>(word(record + 2 * i, 2)));
    const auto half = static_cast<uint16_t>(word(record + scales_offset(a.hidden_size) + i / kGroupSize * 2, 2));
    return exact_mul(f16_to_float(half), static_cast<float>(static_cast<int8_t>(record[i])));
  }

  CHAINFED_DEVICE static bool named_later(const uint8_t* record, int64_t D, int64_t slot, int64_t column) {
    for (int64_t i = slot + 1; i < num_outliers(D); ++i) {
      if (word(record + outliers_offset(D) + i * kOutlierBytes, 2) == column) return true;
    }
    return false;
  }
};

}  // namespace chainfed::cuda

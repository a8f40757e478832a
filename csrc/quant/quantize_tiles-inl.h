// The bodies behind quantize_tiles.h, written over eight lanes (one a row) so that the compiler vectorises them for
// the including file's instruction set. Included once by each quantize_tiles_*.cpp; everything has internal linkage.
//
// int4 minimises the squared error of w = d q + m over a 5 x 5 grid of shortened ranges [lo, hi]: an outlier may be
// clipped so that the other 31 weights are finer. Each candidate's codes give d and m by least squares; these are
// rounded to f16, the codes recomputed from them, and the error measured with exactly what will be stored.
#pragma once
#include <cstdint>

#include "base/half.h"
#include "quant/nf4_table.h"

namespace chainfed {
namespace {

constexpr int kLanes = 8;
constexpr int kCols = 32;
constexpr float kShrink[] = {0.0f, 0.03f, 0.07f, 0.12f, 0.18f};  // parts of the range cut off at either end
constexpr float kLargestF16 = 65504.0f;

// Round to nearest even for |value| < 2^22, without a library call.
static inline float round_even(float value) { return (value + 12582912.0f) - 12582912.0f; }

static inline float as_f16(float value) { return f16_to_float(float_to_f16(value)); }

static inline float clamp(float value, float low, float high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

struct Affine {
  alignas(32) float scale[kLanes], offset[kLanes], inverse[kLanes];
};

static inline void set_inverse(Affine& map) {
  for (int r = 0; r < kLanes; ++r) map.inverse[r] = map.scale[r] > 0.0f ? 1.0f / map.scale[r] : 0.0f;
}

// Least squares of w against the codes that `map` gives.
static inline void refine(const float* columns, const Affine& map, Affine& refined) {
  alignas(32) float sum_q[kLanes] = {}, sum_qq[kLanes] = {}, sum_w[kLanes] = {}, sum_qw[kLanes] = {};
  for (int c = 0; c < kCols; ++c) {
    for (int r = 0; r < kLanes; ++r) {
      const float w = columns[c * kLanes + r];
      const float q = clamp(round_even((w - map.offset[r]) * map.inverse[r]), 0.0f, 15.0f);
      sum_q[r] += q;
      sum_qq[r] += q * q;
      sum_w[r] += w;
      sum_qw[r] += q * w;
    }
  }
  for (int r = 0; r < kLanes; ++r) {
    const float determinant = kCols * sum_qq[r] - sum_q[r] * sum_q[r];
    const float scale = determinant > 0.0f ? (kCols * sum_qw[r] - sum_q[r] * sum_w[r]) / determinant : 0.0f;
    refined.scale[r] = as_f16(scale > 0.0f ? scale : 0.0f);
    refined.offset[r] = as_f16((sum_w[r] - refined.scale[r] * sum_q[r]) / kCols);
  }
  set_inverse(refined);
}

static inline void squared_error(const float* columns, const Affine& map, float* error) {
  alignas(32) float sum[kLanes] = {};
  for (int c = 0; c < kCols; ++c) {
    for (int r = 0; r < kLanes; ++r) {
      const float w = columns[c * kLanes + r];
      const float q = clamp(round_even((w - map.offset[r]) * map.inverse[r]), 0.0f, 15.0f);
      const float difference = w - (map.scale[r] * q + map.offset[r]);
      sum[r] += difference * difference;
    }
  }
  for (int r = 0; r < kLanes; ++r) error[r] = sum[r];
}

static inline void keep_better(const float* columns, const Affine& candidate, Affine& best, float* best_error) {
  alignas(32) float error[kLanes];
  squared_error(columns, candidate, error);
  for (int r = 0; r < kLanes; ++r) {
    const bool better = error[r] < best_error[r];
    best_error[r] = better ? error[r] : best_error[r];
    best.scale[r] = better ? candidate.scale[r] : best.scale[r];
    best.offset[r] = better ? candidate.offset[r] : best.offset[r];
  }
}

static inline void store_int4(const float* columns, Affine& map, uint8_t* codes, uint16_t* scales) {
  set_inverse(map);
  alignas(32) uint8_t q[kCols][kLanes];
  for (int c = 0; c < kCols; ++c) {
    for (int r = 0; r < kLanes; ++r) {
      const float w = columns[c * kLanes + r];
      q[c][r] = static_cast<uint8_t>(clamp(round_even((w - map.offset[r]) * map.inverse[r]), 0.0f, 15.0f));
    }
  }
  for (int j = 0; j < 4; ++j) {
    for (int r = 0; r < kLanes; ++r) {
      for (int i = 0; i < 4; ++i) {
        codes[j * 32 + r * 4 + i] = static_cast<uint8_t>(q[4 * j + i][r] | (q[16 + 4 * j + i][r] << 4));
      }
    }
  }
  for (int r = 0; r < kLanes; ++r) {
    scales[r] = float_to_f16(map.scale[r]);
    scales[kLanes + r] = float_to_f16(map.offset[r]);
  }
}

bool quantize_int4_tile(const float* columns, uint8_t* codes, uint16_t* scales) {
  alignas(32) float low[kLanes], high[kLanes], best_error[kLanes];
  for (int r = 0; r < kLanes; ++r) low[r] = high[r] = columns[r];
  for (int c = 1; c < kCols; ++c) {
    for (int r = 0; r < kLanes; ++r) {
      const float w = columns[c * kLanes + r];
      low[r] = w < low[r] ? w : low[r];
      high[r] = w > high[r] ? w : high[r];
    }
  }
  for (int r = 0; r < kLanes; ++r) {
    // The searched scale never exceeds the full range's, so this covers every candidate.
    if (low[r] < -kLargestF16 || high[r] > kLargestF16) return false;
  }
  // The plain min-max map: the only candidate for a constant row, which it gives exactly up to f16.
  Affine best, start, candidate;
  for (int r = 0; r < kLanes; ++r) {
    best.scale[r] = as_f16((high[r] - low[r]) / 15.0f);
    best.offset[r] = as_f16(low[r]);
  }
  set_inverse(best);
  squared_error(columns, best, best_error);
  for (float cut_low : kShrink) {
    for (float cut_high : kShrink) {
      for (int r = 0; r < kLanes; ++r) {
        const float range = high[r] - low[r];
        start.offset[r] = low[r] + cut_low * range;
        start.scale[r] = range * (1.0f - cut_low - cut_high) / 15.0f;
      }
      set_inverse(start);
      refine(columns, start, candidate);
      keep_better(columns, candidate, best, best_error);
    }
  }
  // One more round from the winner.
  set_inverse(best);
  refine(columns, best, candidate);
  keep_better(columns, candidate, best, best_error);
  store_int4(columns, best, codes, scales);
  return true;
}

bool quantize_int4(const float* columns, int64_t num_tiles, uint8_t* codes, uint16_t* scales) {
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    if (!quantize_int4_tile(columns + tile * kCols * kLanes, codes + tile * 128, scales + tile * 16)) return false;
  }
  return true;
}

static inline void absolute_maximum(const float* columns, int num_cols, float* maximum) {
  for (int r = 0; r < kLanes; ++r) maximum[r] = 0.0f;
  for (int c = 0; c < num_cols; ++c) {
    for (int r = 0; r < kLanes; ++r) {
      const float w = columns[c * kLanes + r];
      const float magnitude = w < 0.0f ? -w : w;
      maximum[r] = magnitude > maximum[r] ? magnitude : maximum[r];
    }
  }
}

bool quantize_int8(const float* columns, int64_t num_tiles, int8_t* codes, uint16_t* scales) {
  for (int64_t tile = 0; tile < num_tiles; ++tile, columns += kCols * kLanes, codes += 256, scales += kLanes) {
    alignas(32) float maximum[kLanes], inverse[kLanes];
    absolute_maximum(columns, kCols, maximum);
    for (int r = 0; r < kLanes; ++r) {
      const float scale = maximum[r] / 127.0f;
      if (scale > kLargestF16) return false;
      scales[r] = float_to_f16(scale);
      const float stored = f16_to_float(scales[r]);
      inverse[r] = stored > 0.0f ? 1.0f / stored : 0.0f;
    }
    for (int c = 0; c < kCols; ++c) {
      for (int r = 0; r < kLanes; ++r) {
        const float q = clamp(columns[c * kLanes + r] * inverse[r], -127.0f, 127.0f);
        codes[c / 4 * 32 + r * 4 + c % 4] = static_cast<int8_t>(round_even(q));
      }
    }
  }
  return true;
}

void quantize_nf4(const float* columns, int64_t num_tiles, uint8_t* codes, float* scales) {
  float midpoints[15];
  for (int q = 0; q < 15; ++q) midpoints[q] = (kNf4Table[q] + kNf4Table[q + 1]) * 0.5f;
  for (int64_t pair = 0; pair < num_tiles / 2; ++pair, columns += 2 * kCols * kLanes, codes += 256, scales += kLanes) {
    alignas(32) float inverse[kLanes];
    absolute_maximum(columns, 2 * kCols, scales);
    // A block of zeros: every weight scales to 0 and gets the code of the table's zero.
    for (int r = 0; r < kLanes; ++r) inverse[r] = scales[r] > 0.0f ? 1.0f / scales[r] : 0.0f;
    alignas(32) uint8_t q[2 * kCols][kLanes];
    for (int c = 0; c < 2 * kCols; ++c) {
      alignas(32) int32_t code[kLanes] = {};
      for (float midpoint : midpoints) {
        for (int r = 0; r < kLanes; ++r) {
          code[r] += clamp(columns[c * kLanes + r] * inverse[r], -1.0f, 1.0f) > midpoint ? 1 : 0;
        }
      }
      for (int r = 0; r < kLanes; ++r) q[c][r] = static_cast<uint8_t>(code[r]);
    }
    for (int byte = 0; byte < 256; ++byte) {
      const int col = byte / 128 * 32 + byte % 128 / 32 * 4 + byte % 4, row = byte % 32 / 4;
      codes[byte] = static_cast<uint8_t>(q[col][row] | (q[col + 16][row] << 4));
    }
  }
}

}  // namespace
}  // namespace chainfed

// The bodies behind quantize_tiles.h, written over vectors of eight lanes, one a row of the tile; the compiler turns
// them into the including file's instruction set. Included once by each quantize_tiles_*.cpp; everything has internal
// linkage.
//
// int4 minimises the squared error of w = d q + m over a 5 x 5 grid of shortened ranges [lo, hi]: an outlier may be
// clipped so that the other 31 weights are finer. Each candidate's codes give d and m by least squares; these are
// rounded to f16, the codes recomputed from them, and the error measured with exactly what will be stored.
#pragma once
#include <cstdint>
#include <cstring>

#include "base/half.h"
#include "quant/lanes-inl.h"
#include "quant/nf4_table.h"

namespace chainfed {
namespace {

constexpr int kCols = 32;
constexpr float kShrink[] = {0.0f, 0.03f, 0.07f, 0.12f, 0.18f};  // parts of the range cut off at either end
constexpr float kLargestF16 = 65504.0f;

struct Affine {
  Lanes scale, offset, inverse;
};

static inline void set_inverse(Affine& map) { map.inverse = map.scale > 0.0f ? 1.0f / map.scale : Lanes{}; }

// The nearest code 0..15, ties to even (adding 1.5 * 2^23 leaves no room for a fraction).
static inline void nearest_code(const Lanes& w, const Affine& map, Lanes& code) {
  constexpr float kNoFraction = 12582912.0f;
  code = (w - map.offset) * map.inverse + kNoFraction;
  maximise(code, Lanes{} + kNoFraction);
  minimise(code, Lanes{} + (kNoFraction + 15.0f));
  code -= kNoFraction;
}

// Least squares of w against the codes that `map` gives.
static inline void refine(const float* columns, const Affine& map, Affine& refined) {
  Lanes sum_q{}, sum_qq{}, sum_w{}, sum_qw{};
  for (int c = 0; c < kCols; ++c) {
    const Lanes w = load(columns + c * kLanes);
    Lanes q;
    nearest_code(w, map, q);
    sum_q += q;
    sum_qq += q * q;
    sum_w += w;
    sum_qw += q * w;
  }
  const Lanes determinant = kCols * sum_qq - sum_q * sum_q;
  Lanes scale = determinant > 0.0f ? (kCols * sum_qw - sum_q * sum_w) / determinant : Lanes{};
  scale = scale > 0.0f ? scale : Lanes{};
  round_to_f16(scale);
  refined.scale = scale;
  refined.offset = (sum_w - scale * sum_q) / static_cast<float>(kCols);
  round_to_f16(refined.offset);
  set_inverse(refined);
}

static inline void squared_error(const float* columns, const Affine& map, Lanes& error) {
  error = Lanes{};
  for (int c = 0; c < kCols; ++c) {
    const Lanes w = load(columns + c * kLanes);
    Lanes q;
    nearest_code(w, map, q);
    const Lanes difference = w - (map.scale * q + map.offset);
    error += difference * difference;
  }
}

static inline void keep_better(const float* columns, const Affine& candidate, Affine& best, Lanes& best_error) {
  Lanes error;
  squared_error(columns, candidate, error);
  const IntLanes better = error < best_error;
  best_error = better ? error : best_error;
  best.scale = better ? candidate.scale : best.scale;
  best.offset = better ? candidate.offset : best.offset;
}

static inline void store_int4(const float* columns, Affine& map, uint8_t* codes, uint16_t* scales) {
  set_inverse(map);
  for (int c = 0; c < kCols / 2; ++c) {
    const Lanes low_w = load(columns + c * kLanes), high_w = load(columns + (c + 16) * kLanes);
    Lanes low, high;
    nearest_code(low_w, map, low);
    nearest_code(high_w, map, high);
    for (int r = 0; r < kLanes; ++r) {
      const int byte = static_cast<int>(low[r]) | static_cast<int>(high[r]) << 4;
      codes[c / 4 * 32 + r * 4 + c % 4] = static_cast<uint8_t>(byte);
    }
  }
  for (int r = 0; r < kLanes; ++r) {
    scales[r] = float_to_f16(map.scale[r]);
    scales[kLanes + r] = float_to_f16(map.offset[r]);
  }
}

bool quantize_int4_tile(const float* columns, uint8_t* codes, uint16_t* scales) {
  Lanes low = load(columns), high = low;
  for (int c = 1; c < kCols; ++c) {
    const Lanes w = load(columns + c * kLanes);
    minimise(low, w);
    maximise(high, w);
  }
  for (int r = 0; r < kLanes; ++r) {
    // The searched scale never exceeds the full range's, so this covers every candidate.
    if (low[r] < -kLargestF16 || high[r] > kLargestF16) return false;
  }
  // The plain min-max map: the only candidate for a constant row, which it gives exactly up to f16.
  const Lanes range = high - low;
  Affine best, start, candidate;
  best.scale = range / 15.0f;
  best.offset = low;
  round_to_f16(best.scale);
  round_to_f16(best.offset);
  set_inverse(best);
  Lanes best_error;
  squared_error(columns, best, best_error);
  for (float cut_low : kShrink) {
    for (float cut_high : kShrink) {
      start.offset = low + cut_low * range;
      start.scale = range * (1.0f - cut_low - cut_high) / 15.0f;
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

static inline void absolute_maximum(const float* columns, int num_cols, Lanes& maximum) {
  maximum = Lanes{};
  for (int c = 0; c < num_cols; ++c) {
    const Lanes w = load(columns + c * kLanes);
    maximise(maximum, w);
    maximise(maximum, -w);
  }
}

bool quantize_int8(const float* columns, int64_t num_tiles, int8_t* codes, uint16_t* scales) {
  for (int64_t tile = 0; tile < num_tiles; ++tile, columns += kCols * kLanes, codes += 256, scales += kLanes) {
    Lanes scale;
    absolute_maximum(columns, kCols, scale);
    scale /= 127.0f;
    for (int r = 0; r < kLanes; ++r) {
      if (scale[r] > kLargestF16) return false;
      scales[r] = float_to_f16(scale[r]);
    }
    round_to_f16(scale);
    const Lanes inverse = scale > 0.0f ? 1.0f / scale : Lanes{};
    for (int c = 0; c < kCols; ++c) {
      Lanes q = load(columns + c * kLanes) * inverse;
      q = q < -127.0f ? Lanes{} - 127.0f : q;
      q = q > 127.0f ? Lanes{} + 127.0f : q;
      q = (q + 12582912.0f) - 12582912.0f;
      for (int r = 0; r < kLanes; ++r) codes[c / 4 * 32 + r * 4 + c % 4] = static_cast<int8_t>(q[r]);
    }
  }
  return true;
}

void quantize_nf4(const float* columns, int64_t num_tiles, uint8_t* codes, float* scales) {
  float midpoints[15];
  for (int q = 0; q < 15; ++q) midpoints[q] = (kNf4Table[q] + kNf4Table[q + 1]) * 0.5f;
  for (int64_t pair = 0; pair < num_tiles / 2; ++pair, columns += 2 * kCols * kLanes, codes += 256, scales += kLanes) {
    Lanes absmax;
    absolute_maximum(columns, 2 * kCols, absmax);
    std::memcpy(scales, &absmax, sizeof absmax);
    // A block of zeros: every weight scales to 0 and gets the code of the table's zero.
    const Lanes inverse = absmax > 0.0f ? 1.0f / absmax : Lanes{};
    uint8_t q[2 * kCols][kLanes];
    for (int c = 0; c < 2 * kCols; ++c) {
      const Lanes scaled = load(columns + c * kLanes) * inverse;  // at most 1 + an ulp: beyond every midpoint
      IntLanes code{};
      for (float midpoint : midpoints) code -= scaled > midpoint;
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

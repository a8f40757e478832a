#include <arm_neon.h>

#include <cmath>
#include <limits>

#include "head/cell.h"

namespace chainfed {
namespace {

// As in cell_avx2.cpp: exp for x <= 0, within 2 units in the last place; below -87 the result is 0.
float32x4_t exp_negative(float32x4_t x) {
  const uint32x4_t underflow = vcltq_f32(x, vdupq_n_f32(-87.0f));
  const float32x4_t n = vrndnq_f32(vmulq_n_f32(x, 1.44269504088896341f));
  float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(0.693359375f));
  r = vfmsq_f32(r, n, vdupq_n_f32(-2.12194440e-4f));
  float32x4_t p = vdupq_n_f32(1.984126984e-4f);
  p = vfmaq_f32(vdupq_n_f32(1.388888889e-3f), p, r);
  p = vfmaq_f32(vdupq_n_f32(8.333333333e-3f), p, r);
  p = vfmaq_f32(vdupq_n_f32(4.166666667e-2f), p, r);
  p = vfmaq_f32(vdupq_n_f32(0.1666666667f), p, r);
  p = vfmaq_f32(vdupq_n_f32(0.5f), p, r);
  p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
  p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
  const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23);
  const float32x4_t value = vmulq_f32(p, vreinterpretq_f32_s32(power));
  return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value), underflow));
}

// A block of the panel's columns for one token.
template <int Token>
inline void add_row(const float32x4_t panel[4], float32x4_t weights, float32x4_t sum[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) sum[i] = vfmaq_laneq_f32(sum[i], panel[i], weights, Token);
}

}  // namespace

float softmax_row_neon(float* z, int64_t count, float* running_max, float* running_sum) {
  const int64_t whole = count / 4 * 4;
  float tail[4];
  for (float& value : tail) value = -std::numeric_limits<float>::infinity();
  for (int64_t i = whole; i < count; ++i) tail[i - whole] = z[i];
  float32x4_t last = vld1q_f32(tail), max_lanes = last;
  uint32x4_t ordered = vceqq_f32(last, last);
  for (int64_t i = 0; i < whole; i += 4) {
    const float32x4_t value = vld1q_f32(z + i);
    ordered = vandq_u32(ordered, vceqq_f32(value, value));
    max_lanes = vmaxq_f32(max_lanes, value);
  }
  const float max = std::fmax(*running_max, vmaxvq_f32(max_lanes));
  if (vminvq_u32(ordered) == 0 || !std::isfinite(max)) {
    *running_max = *running_sum = std::numeric_limits<float>::quiet_NaN();
    for (int64_t i = 0; i < count; ++i) z[i] = 0.0f;
    return 1.0f;
  }
  const float32x4_t shift = vdupq_n_f32(max);
  last = exp_negative(vsubq_f32(last, shift));
  vst1q_f32(tail, last);
  for (int64_t i = whole; i < count; ++i) z[i] = tail[i - whole];
  float32x4_t sum = last;
  for (int64_t i = 0; i < whole; i += 4) {
    const float32x4_t e = exp_negative(vsubq_f32(vld1q_f32(z + i), shift));
    vst1q_f32(z + i, e);
    sum = vaddq_f32(sum, e);
  }
  const float rescale = std::exp(*running_max - max);
  *running_max = max;
  *running_sum = *running_sum * rescale + vaddvq_f32(sum);
  return rescale;
}

void fill_cell_neon(const float* const* e, int64_t count, const float* least, Cell* cell) {
  const float32x4_t bound = vld1q_f32(least);
  float32x4_t left_out = vdupq_n_f32(0.0f);
  int32_t used = 0;
  const auto take = [&](float32x4_t value, int64_t row) {
    const uint32x4_t keep = vcgeq_f32(value, bound);
    const uint32x4_t bits = vreinterpretq_u32_f32(value);
    left_out = vaddq_f32(left_out, vreinterpretq_f32_u32(vbicq_u32(bits, keep)));
    vst1q_f32(cell->weight[used], vreinterpretq_f32_u32(vandq_u32(bits, keep)));
    cell->row[used] = static_cast<uint8_t>(row);
    used += vmaxvq_u32(keep) != 0;
  };
  int64_t row = 0;
  for (; row + 4 <= count; row += 4) {
    const float32x4_t v0 = vld1q_f32(e[0] + row), v1 = vld1q_f32(e[1] + row);
    const float32x4_t v2 = vld1q_f32(e[2] + row), v3 = vld1q_f32(e[3] + row);
    const float32x4_t a = vzip1q_f32(v0, v2), b = vzip2q_f32(v0, v2), c = vzip1q_f32(v1, v3), d = vzip2q_f32(v1, v3);
    take(vzip1q_f32(a, c), row);
    take(vzip2q_f32(a, c), row + 1);
    take(vzip1q_f32(b, d), row + 2);
    take(vzip2q_f32(b, d), row + 3);
  }
  for (; row < count; ++row) {
    const float one[4] = {e[0][row], e[1][row], e[2][row], e[3][row]};
    take(vld1q_f32(one), row);
  }
  if (vmaxvq_f32(left_out) > 0.0f) {
    vst1q_f32(cell->weight[used], left_out);
    cell->row[used++] = kMeanRow;
  }
  cell->count = used;
}

void accumulate_cell_neon(const Cell& cell, const float* panel, float* const* grad) {
  for (int64_t c = 0; c < kPanelCols; c += 16) {
    float32x4_t sum[kBlockTokens][4];
    for (auto& token : sum) token[0] = token[1] = token[2] = token[3] = vdupq_n_f32(0.0f);
    for (int32_t k = 0; k < cell.count; ++k) {
      const float* w = panel + static_cast<int64_t>(cell.row[k]) * kPanelCols + c;
      const float32x4_t rows[4] = {vld1q_f32(w), vld1q_f32(w + 4), vld1q_f32(w + 8), vld1q_f32(w + 12)};
      const float32x4_t weights = vld1q_f32(cell.weight[k]);
      add_row<0>(rows, weights, sum[0]);
      add_row<1>(rows, weights, sum[1]);
      add_row<2>(rows, weights, sum[2]);
      add_row<3>(rows, weights, sum[3]);
    }
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      for (int i = 0; i < 4; ++i) {
        float* target = grad[t] + c + 4 * i;
        vst1q_f32(target, vaddq_f32(vld1q_f32(target), sum[t][i]));
      }
    }
  }
}

}  // namespace chainfed

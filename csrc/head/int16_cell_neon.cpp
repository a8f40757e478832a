// A widening multiply-add makes four products, as an f32 one does: on Arm this saves memory and keeps the results close
// to those of other machines, but no time.
#include <arm_neon.h>

#include "head/int16_cell.h"

namespace chainfed {
namespace {

float32x4_t inverse_or_zero(float32x4_t scale) {
  const uint32x4_t usable = vcgeq_f32(scale, vdupq_n_f32(kLeastScale));
  const float32x4_t inverse = vdivq_f32(vdupq_n_f32(1.0f), scale);
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(inverse), usable));
}

int16x4_t quantize_4(const float* values, float32x4_t factor) {
  const float32x4_t largest = vdupq_n_f32(kLargestInt16);
  const float32x4_t scaled = vmulq_f32(vld1q_f32(values), factor);
  return vmovn_s32(vcvtnq_s32_f32(vmaxq_f32(vminq_f32(scaled, largest), vnegq_f32(largest))));
}

// Eight lanes are four columns and the four that lie 16 further on.
void quantize_row(const float* row, const float32x4_t factor[8], int16_t* out) {
  for (int i = 0; i < 4; ++i) {
    vst1_s16(out + 8 * i, quantize_4(row + 4 * i, factor[i]));
    vst1_s16(out + 8 * i + 4, quantize_4(row + 16 + 4 * i, factor[4 + i]));
  }
}

// The two rows of a pair for one token: sums [0] and [2] hold columns 8 * half .. + 7, [1] and [3] those 16 further on.
template <int Token>
inline void add_pair(int16x8_t weights, const int16x8_t first[2], const int16x8_t second[2], int32x4_t sum[4]) {
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    sum[2 * i] = vmlal_laneq_s16(sum[2 * i], vget_low_s16(first[i]), weights, 2 * Token);
    sum[2 * i + 1] = vmlal_high_laneq_s16(sum[2 * i + 1], first[i], weights, 2 * Token);
    sum[2 * i] = vmlal_laneq_s16(sum[2 * i], vget_low_s16(second[i]), weights, 2 * Token + 1);
    sum[2 * i + 1] = vmlal_high_laneq_s16(sum[2 * i + 1], second[i], weights, 2 * Token + 1);
  }
}

}  // namespace

void quantize_cell_neon(const Cell& cell, Int16Cell* out) {
  float32x4_t largest = vdupq_n_f32(0.0f), sum = largest;
  for (int32_t k = 0; k < cell.count; ++k) {
    const float32x4_t weight = vld1q_f32(cell.weight[k]);
    largest = vmaxq_f32(largest, weight);
    sum = vaddq_f32(sum, weight);
  }
  const float32x4_t scale =
      vmaxq_f32(vdivq_f32(largest, vdupq_n_f32(kLargestInt16)), vdivq_f32(sum, vdupq_n_f32(kWeightSum)));
  const float32x4_t factor = inverse_or_zero(scale);
  vst1q_f32(out->scale, scale);
  out->num_pairs = (cell.count + 1) / 2;
  for (int32_t pair = 0; pair < out->num_pairs; ++pair) {
    const bool odd = 2 * pair + 1 == cell.count;
    const int16x4_t first = quantize_4(cell.weight[2 * pair], factor);
    const int16x4_t second = odd ? vdup_n_s16(0) : quantize_4(cell.weight[2 * pair + 1], factor);
    const int16x4x2_t both = {{first, second}};
    vst2_s16(out->weight[pair][0], both);
    out->row[pair][0] = cell.row[2 * pair];
    out->row[pair][1] = odd ? cell.row[0] : cell.row[2 * pair + 1];
  }
}

void quantize_panel_neon(const float* panel, int64_t num_rows, Int16Panel* out) {
  float32x4_t largest[8], factor[8];
  for (float32x4_t& value : largest) value = vdupq_n_f32(0.0f);
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int i = 0; i < 8; ++i)
      largest[i] = vmaxq_f32(largest[i], vabsq_f32(vld1q_f32(panel + r * kPanelCols + 4 * i)));
  }
  for (int i = 0; i < 8; ++i) {
    const float32x4_t scale = vdivq_f32(largest[i], vdupq_n_f32(kLargestInt16));
    vst1q_f32(out->scale + 4 * i, scale);
    factor[i] = inverse_or_zero(scale);
  }
  for (int64_t r = 0; r < num_rows; ++r) quantize_row(panel + r * kPanelCols, factor, out->value[r]);
  quantize_row(panel + kMeanRow * kPanelCols, factor, out->value[kMeanRow]);
}

void accumulate_int16_neon(const Int16Cell& cell, const Int16Panel& panel, float* const* grad) {
  for (int half = 0; half < 2; ++half) {
    int32x4_t sum[kBlockTokens][4];
    for (auto& token : sum) token[0] = token[1] = token[2] = token[3] = vdupq_n_s32(0);
    for (int32_t pair = 0; pair < cell.num_pairs; ++pair) {
      const int16_t* a = panel.value[cell.row[pair][0]] + 16 * half;
      const int16_t* b = panel.value[cell.row[pair][1]] + 16 * half;
      const int16x8_t first[2] = {vld1q_s16(a), vld1q_s16(a + 8)}, second[2] = {vld1q_s16(b), vld1q_s16(b + 8)};
      const int16x8_t weights = vld1q_s16(cell.weight[pair][0]);
      add_pair<0>(weights, first, second, sum[0]);
      add_pair<1>(weights, first, second, sum[1]);
      add_pair<2>(weights, first, second, sum[2]);
      add_pair<3>(weights, first, second, sum[3]);
    }
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      for (int i = 0; i < 4; ++i) {
        const int64_t column = 8 * half + i / 2 * 4 + i % 2 * 16;
        const float32x4_t scale = vmulq_n_f32(vld1q_f32(panel.scale + column), cell.scale[t]);
        float* target = grad[t] + column;
        vst1q_f32(target, vfmaq_f32(vld1q_f32(target), vcvtq_f32_s32(sum[t][i]), scale));
      }
    }
  }
}

}  // namespace chainfed

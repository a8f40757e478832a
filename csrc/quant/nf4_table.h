// The one NF4 table: quantiles of a normal distribution scaled to [-1, 1] with an exact zero (Dettmers et al.,
// QLoRA, 2023, appendix E), as f32. Its values are a macro because device code cannot read an array of the namespace.
#pragma once

// clang-format off
#define CHAINFED_NF4_VALUES \
  -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, \
  -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f, \
  0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f, \
  0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f
// clang-format on

namespace chainfed {

inline constexpr float kNf4Table[16] = {CHAINFED_NF4_VALUES};

}  // namespace chainfed

// The one NF4 table: quantiles of a normal distribution scaled to [-1, 1] with an exact zero (Dettmers et al.,
// QLoRA, 2023, appendix E), as f32.
#pragma once

namespace chainfed {

extern const float kNf4Table[16];

}  // namespace chainfed

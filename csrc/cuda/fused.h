// The shapes in which MmaLinear is built, and which of them a call runs. Included by one .cu a block format.
#pragma once
#include <algorithm>

#include "cuda/linear.h"
#include "cuda/mma_linear.h"

namespace chainfed::cuda {

// Few tokens: all four warps beside one another along the outputs, so that a code is decoded once.
template <BlockFormat F, Direction D>
using FewTokens = MmaLinear<F, D, 1, 1, 4, 4>;  // 16 x 256
template <BlockFormat F, Direction D>
using SomeTokens = MmaLinear<F, D, 4, 1, 4, F == BlockFormat::int8 ? 3 : 4>;  // 64 x 256; four of int8's are too large
template <BlockFormat F, Direction D>
using ManyTokens = MmaLinear<F, D, 4, 2, 2, 3>;  // 128 x 128
constexpr int64_t kFewTokens = 16, kSomeTokens = 64;
constexpr int64_t kStepCols = 64;
constexpr int64_t kMaxSplits = 8, kMinStepsOfSplit = 4;
constexpr int64_t kMaxPartialBytes = int64_t{32} << 20;

// Into how many parts a product's sum is split so that the device has two blocks a processor.
inline int64_t num_splits(const Device& device, int64_t num_tokens, int64_t num_outputs, int64_t num_steps) {
  const int64_t tokens = num_tokens <= kFewTokens ? 16 : num_tokens <= kSomeTokens ? 64 : 128;
  const int64_t outputs = num_tokens <= kSomeTokens ? 256 : 128;
  const int64_t blocks = (num_tokens + tokens - 1) / tokens * ((num_outputs + outputs - 1) / outputs);
  int64_t splits = std::min(kMaxSplits, 2 * device.num_processors / blocks);
  splits = std::min(splits, num_steps / kMinStepsOfSplit);
  splits = std::min(splits, kMaxPartialBytes / (4 * num_tokens * num_outputs));
  return std::max<int64_t>(splits, 1);
}

template <typename Kernel>
void start(Stream stream, const MmaLinearArgs& args, int64_t splits) {
  launch<Kernel>(stream, Kernel::grid(args.num_tokens, args.num_outputs, splits), args);
}

template <BlockFormat F, Direction D>
void fused_product(const Device& device, Stream stream, const FusedCall& call) {
  const int64_t outputs = D == Direction::forward ? call.w.num_rows : call.w.num_cols;
  const int64_t num_steps = call.activation_cols / kStepCols;
  const int64_t splits = num_splits(device, call.num_tokens, outputs, num_steps);
  const bool is_split = splits > 1;
  const int64_t steps = (num_steps + splits - 1) / splits, used = (num_steps + steps - 1) / steps;
  const MmaLinearArgs args{static_cast<const unsigned char*>(call.w.codes),
                           static_cast<const unsigned char*>(call.w.scales),
                           tiles_in_row(F, call.w.num_cols),
                           (call.w.num_rows + kTileRows - 1) / kTileRows,
                           call.activations,
                           call.activation_cols,
                           call.row_scale,
                           call.bias,
                           is_split ? call.partial : call.out,
                           call.num_tokens,
                           outputs,
                           steps,
                           is_split,
                           call.accumulate};
  if (call.num_tokens <= kFewTokens) {
    start<FewTokens<F, D>>(stream, args, used);
  } else if (call.num_tokens <= kSomeTokens) {
    start<SomeTokens<F, D>>(stream, args, used);
  } else {
    start<ManyTokens<F, D>>(stream, args, used);
  }
  if (!is_split) return;
  launch<SumSplits>(
      stream, SumSplits::grid(call.num_tokens, outputs),
      {call.partial, call.row_scale, call.bias, call.out, used, call.num_tokens, outputs, call.accumulate});
}

template <BlockFormat F>
void fused_format(const Device& device, Stream stream, const FusedCall& call) {
  if (call.direction == Direction::forward) {
    fused_product<F, Direction::forward>(device, stream, call);
  } else {
    fused_product<F, Direction::grad>(device, stream, call);
  }
}

void fused_int4(const Device& device, Stream stream, const FusedCall& call);
void fused_nf4(const Device& device, Stream stream, const FusedCall& call);
void fused_int8(const Device& device, Stream stream, const FusedCall& call);

}  // namespace chainfed::cuda

// Softmax cross-entropy against a frozen head without logits in memory beyond one tile; the same accumulators and the
// same two calls as the CPU's (kernels.h). 4 V D FLOP a token: each vocabulary row is read for its logit and again for
// its part of the gradient, which is complete when the last shard is through.
#pragma once
#include <cstdint>

#include "cuda/linear.h"

namespace chainfed::cuda {

void cross_entropy_update(const Device& device, Stream stream, const CrossEntropyCall& call, void* workspace);
void cross_entropy_finish(Stream stream, const FinishCall& call);
// At most 64 MiB up to a hidden size of 8192.
int64_t cross_entropy_workspace_bytes(const Device& device, BlockFormat format, int64_t num_tokens, int64_t num_rows,
                                      int64_t hidden_size);

}  // namespace chainfed::cuda

// The fused bottleneck adapter, h + up(gelu(down(h))), for a few tokens at a time: out [n, D] in f32. n is at most
// kAdapterTokens; the caller bounds hidden_size and width, because the intermediate values live on the stack.
#pragma once
#include <cmath>
#include <cstdint>

#include "chainfed/kernels.h"

namespace chainfed {

constexpr int64_t kAdapterTokens = 16;
constexpr int64_t kMaxAdapterHiddenSize = 16384;  // 1 MiB of stack a thread at most
constexpr int64_t kMaxAdapterWidth = 2048;

using ApplyAdapter = void (*)(const BottleneckView& adapter, const float* hidden /*[n,D]*/, int64_t num_tokens,
                              int64_t hidden_size, float* out /*[n,D]*/);

void apply_adapter_scalar(const BottleneckView& adapter, const float* hidden, int64_t num_tokens, int64_t hidden_size,
                          float* out);
#if defined(CHAINFED_X86)
void apply_adapter_avx2(const BottleneckView& adapter, const float* hidden, int64_t num_tokens, int64_t hidden_size,
                        float* out);
void apply_adapter_avx512vnni(const BottleneckView& adapter, const float* hidden, int64_t num_tokens,
                              int64_t hidden_size, float* out);
#elif defined(CHAINFED_ARM64)
void apply_adapter_neon(const BottleneckView& adapter, const float* hidden, int64_t num_tokens, int64_t hidden_size,
                        float* out);
#endif

// erfc keeps its relative precision where 1 + erf(x) would cancel.
static inline float gelu(float x) { return 0.5f * x * std::erfc(-0.70710678118654752f * x); }

}  // namespace chainfed

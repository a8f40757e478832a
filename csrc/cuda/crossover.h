// From how many tokens on decoding a matrix once and cuBLASLt's product beat the fused one. The one place where these
// numbers stand: bench/cuda/run.sh prints them beside what it measured, to be corrected here.
//
// Calculated, not measured. A weight decoded to bf16 moves 2.6 bytes (0.56 read, 2 written), and a token's activations
// 6 bytes a value more; the fused product (mma.sync) runs at about 0.6 of cuBLASLt on Hopper, whose wgmma it does not
// use, and 0.75 on Ampere. With 3.35 TB/s and 650 TFLOPS (H100) they meet at 400 to 500 tokens, with 2 TB/s and 250
// TFLOPS (A100) at 500 to 800. Where memory is narrow for the processor (boards, graphics cards) they meet beyond a
// thousand, and the scratch is the memory that is short: never.
#pragma once
#include <cstdint>

namespace chainfed::cuda {

constexpr int64_t kNever = INT64_MAX;
struct Crossover {
  int architecture;  // and those above it up to the next row
  int64_t from_tokens;
};
constexpr Crossover kCrossovers[] = {{80, 768}, {86, kNever}, {90, 512}};

int64_t crossover_of(int architecture);

}  // namespace chainfed::cuda

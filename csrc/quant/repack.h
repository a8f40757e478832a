// GGUF blocks taken over without loss. A Q4_1 block is 32 inputs of one row: f16 d, f16 m, 16 bytes whose low nibbles
// are the first 16 inputs and high nibbles the last 16, w = d q + m. A Q8_0 block: f16 d, 32 int8, w = d q. Both are
// the rows of our int4 and int8 tiles in another order. A Q8_0 code of -128 is kept.
#pragma once
#include <cstdint>

namespace chainfed {

constexpr int64_t kQ41BlockBytes = 20;
constexpr int64_t kQ80BlockBytes = 34;

// blocks u8 [num_rows, num_cols / 32 * block bytes]; num_cols a multiple of 32; codes and scales as int4 (int8).
// Throws CorruptFile naming row and block when a scale is not finite; codes and scales are then half written.
void repack_q4_1(const uint8_t* blocks, int64_t num_rows, int64_t num_cols, uint8_t* codes, uint16_t* scales);
void repack_q8_0(const uint8_t* blocks, int64_t num_rows, int64_t num_cols, int8_t* codes, uint16_t* scales);

}  // namespace chainfed

// Tokens between f32 rows and records, one function an instruction set. All versions give the same bits.
#pragma once
#include <cstdint>

namespace chainfed {

// Of an encoder at most; a call for fewer leaves some of its lanes empty.
constexpr int64_t kTokensAtOnce = 8;

using EncodeRows = void (*)(const float* rows /*[T,D]*/, int64_t num_tokens, int64_t hidden_size,
                            uint8_t* records /*[T,record_bytes]*/);
using DecodeRow = void (*)(const uint8_t* record, int64_t hidden_size, float* row /*[D]*/);

void encode_int8_scalar(const float* rows, int64_t num_tokens, int64_t hidden_size, uint8_t* records);
void decode_int8_row_scalar(const uint8_t* record, int64_t hidden_size, float* row);
void encode_bf16_scalar(const float* rows, int64_t num_tokens, int64_t hidden_size, uint8_t* records);
void decode_bf16_row_scalar(const uint8_t* record, int64_t hidden_size, float* row);
#if defined(CHAINFED_X86)
void encode_int8_avx2(const float* rows, int64_t num_tokens, int64_t hidden_size, uint8_t* records);
void decode_int8_row_avx2(const uint8_t* record, int64_t hidden_size, float* row);
void encode_bf16_avx2(const float* rows, int64_t num_tokens, int64_t hidden_size, uint8_t* records);
void decode_bf16_row_avx2(const uint8_t* record, int64_t hidden_size, float* row);
void encode_int8_avx512vnni(const float* rows, int64_t num_tokens, int64_t hidden_size, uint8_t* records);
void decode_int8_row_avx512vnni(const uint8_t* record, int64_t hidden_size, float* row);
#elif defined(CHAINFED_ARM64)
void encode_int8_neon(const float* rows, int64_t num_tokens, int64_t hidden_size, uint8_t* records);
void decode_int8_row_neon(const uint8_t* record, int64_t hidden_size, float* row);
void encode_bf16_neon(const float* rows, int64_t num_tokens, int64_t hidden_size, uint8_t* records);
void decode_bf16_row_neon(const uint8_t* record, int64_t hidden_size, float* row);
#endif

}  // namespace chainfed

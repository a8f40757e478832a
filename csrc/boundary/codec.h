// One token between its f32 row and its record, one function an instruction set. All versions give the same bits.
#pragma once
#include <cstdint>

namespace chainfed {

using EncodeRow = void (*)(const float* row /*[D]*/, int64_t hidden_size, uint8_t* record);
using DecodeRow = void (*)(const uint8_t* record, int64_t hidden_size, float* row /*[D]*/);

void encode_int8_row_scalar(const float* row, int64_t hidden_size, uint8_t* record);
void decode_int8_row_scalar(const uint8_t* record, int64_t hidden_size, float* row);
void encode_bf16_row_scalar(const float* row, int64_t hidden_size, uint8_t* record);
void decode_bf16_row_scalar(const uint8_t* record, int64_t hidden_size, float* row);
#ifdef CHAINFED_X86
void encode_int8_row_avx2(const float* row, int64_t hidden_size, uint8_t* record);
void decode_int8_row_avx2(const uint8_t* record, int64_t hidden_size, float* row);
void encode_bf16_row_avx2(const float* row, int64_t hidden_size, uint8_t* record);
void decode_bf16_row_avx2(const uint8_t* record, int64_t hidden_size, float* row);
void encode_int8_row_avx512vnni(const float* row, int64_t hidden_size, uint8_t* record);
void decode_int8_row_avx512vnni(const uint8_t* record, int64_t hidden_size, float* row);
#endif

}  // namespace chainfed

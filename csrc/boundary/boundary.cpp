// Encoding and decoding of whole blocks of tokens: sizes, the choice of the row functions, the threads. The unit of
// work is what an encoder takes at once, or one token to decode; a thread takes a contiguous run of them.
#include <algorithm>
#include <cstring>
#include <string>

#include "base/simd_level.h"
#include "base/thread_pool.h"
#include "boundary/adapter.h"
#include "boundary/codec.h"
#include "boundary/record.h"
#include "chainfed/error.h"
#include "chainfed/kernels.h"

namespace chainfed {
namespace {

void copy_in(const float* rows, int64_t num_tokens, int64_t hidden_size, uint8_t* records) {
  std::memcpy(records, rows, static_cast<size_t>(num_tokens * hidden_size) * sizeof(float));
}
void copy_out(const uint8_t* record, int64_t hidden_size, float* row) {
  std::memcpy(row, record, static_cast<size_t>(hidden_size) * sizeof(float));
}

// body(begin, end) over tokens, in runs that are whole units but for the last.
template <typename Body>
void parallel_tokens(int64_t num_tokens, int64_t unit, Body body) {
  parallel_ranges((num_tokens + unit - 1) / unit,
                  [&](int64_t begin, int64_t end, int) { body(begin * unit, std::min(end * unit, num_tokens)); });
}

constexpr SimdTable<EncodeRows> kEncodeInt8 = CHAINFED_LEVELS(
    encode_int8_scalar, encode_int8_avx2, encode_int8_avx512vnni, encode_int8_neon, encode_int8_neon, encode_int8_neon);
constexpr SimdTable<DecodeRow> kDecodeInt8 =
    CHAINFED_LEVELS(decode_int8_row_scalar, decode_int8_row_avx2, decode_int8_row_avx512vnni, decode_int8_row_neon,
                    decode_int8_row_neon, decode_int8_row_neon);
constexpr SimdTable<EncodeRows> kEncodeBf16 = CHAINFED_LEVELS(encode_bf16_scalar, encode_bf16_avx2, encode_bf16_avx2,
                                                              encode_bf16_neon, encode_bf16_neon, encode_bf16_neon);
constexpr SimdTable<DecodeRow> kDecodeBf16 =
    CHAINFED_LEVELS(decode_bf16_row_scalar, decode_bf16_row_avx2, decode_bf16_row_avx2, decode_bf16_row_neon,
                    decode_bf16_row_neon, decode_bf16_row_neon);
constexpr SimdTable<ApplyAdapter> kApplyAdapter =
    CHAINFED_LEVELS(apply_adapter_scalar, apply_adapter_avx2, apply_adapter_avx512vnni, apply_adapter_neon,
                    apply_adapter_neon, apply_adapter_neon);

EncodeRows row_encoder(CacheFormat format) {
  if (format == CacheFormat::int8) return select(kEncodeInt8);
  return format == CacheFormat::bf16 ? select(kEncodeBf16) : copy_in;
}

DecodeRow row_decoder(CacheFormat format) {
  if (format == CacheFormat::int8) return select(kDecodeInt8);
  return format == CacheFormat::bf16 ? select(kDecodeBf16) : copy_out;
}

void adapt_and_encode_range(const float* hidden, int64_t begin, int64_t end, int64_t hidden_size,
                            const BottleneckView& adapter, ApplyAdapter apply, EncodeRows encode, int64_t bytes,
                            uint8_t* records) {
  alignas(64) float adapted[kAdapterTokens * kMaxAdapterHiddenSize];  // touched only as far as hidden_size needs
  for (int64_t t = begin; t < end; t += kAdapterTokens) {
    const int64_t count = std::min(kAdapterTokens, end - t);
    apply(adapter, hidden + t * hidden_size, count, hidden_size, adapted);
    encode(adapted, count, hidden_size, records + t * bytes);
  }
}

}  // namespace

int64_t record_bytes(CacheFormat format, int64_t hidden_size) {
  const int64_t largest = format == CacheFormat::int8 ? kMaxInt8HiddenSize : INT32_MAX;
  if (hidden_size < 1 || hidden_size > largest) {
    throw InvalidArgument("hidden_size must be 1.." + std::to_string(largest) + " for this cache format, got " +
                          std::to_string(hidden_size));
  }
  if (format == CacheFormat::f32) return 4 * hidden_size;
  if (format == CacheFormat::bf16) return 2 * hidden_size;
  return int8_record_bytes(hidden_size);
}

void boundary_encode(const float* hidden, int64_t num_tokens, int64_t hidden_size, const BottleneckView* adapter,
                     CacheFormat format, uint8_t* records) {
  const int64_t bytes = record_bytes(format, hidden_size);
  const EncodeRows encode = row_encoder(format);
  if (adapter == nullptr) {
    parallel_tokens(num_tokens, kTokensAtOnce, [&](int64_t begin, int64_t end) {
      encode(hidden + begin * hidden_size, end - begin, hidden_size, records + begin * bytes);
    });
    return;
  }
  if (hidden_size > kMaxAdapterHiddenSize || adapter->width < 1 || adapter->width > kMaxAdapterWidth) {
    throw InvalidArgument("adapter: hidden_size must be at most " + std::to_string(kMaxAdapterHiddenSize) +
                          " and width 1.." + std::to_string(kMaxAdapterWidth) + ", got hidden_size " +
                          std::to_string(hidden_size) + " and width " + std::to_string(adapter->width));
  }
  const ApplyAdapter apply = select(kApplyAdapter);
  parallel_tokens(num_tokens, kAdapterTokens, [&](int64_t begin, int64_t end) {
    adapt_and_encode_range(hidden, begin, end, hidden_size, *adapter, apply, encode, bytes, records);
  });
}

void boundary_decode(const uint8_t* records, int64_t num_tokens, int64_t hidden_size, CacheFormat format,
                     const int64_t* out_rows, float* out) {
  const int64_t bytes = record_bytes(format, hidden_size);
  const DecodeRow decode = row_decoder(format);
  parallel_ranges(num_tokens, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) decode(records + t * bytes, hidden_size, out + out_rows[t] * hidden_size);
  });
}

}  // namespace chainfed

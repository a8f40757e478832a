// What crosses the border between the core's module and the CUDA library: plain structs, no CUDA type, no Python.
// Pointers are device pointers unless a comment says otherwise; input is valid (csrc/bind checks).
#pragma once
#include <cstdint>

#include "chainfed/block_format.h"
#include "chainfed/kernels.h"

namespace chainfed::cuda {

using Stream = void*;  // the caller's stream: a cudaStream_t

// forward: x W^T. grad: g W.
enum class Direction : uint8_t { forward, grad };
// fast: 11-bit factors on tensor cores (8-bit ones in the library's product). exact: f32 throughout.
enum class Precision : uint8_t { fast, exact };

struct LinearCall {
  MatrixView w;
  Direction direction;
  Precision precision;
  const float* x;  // forward: [M, K]; grad: [M, N]
  int64_t num_tokens;
  const float* bias;  // [N] or null; forward only
  float* out;         // forward: [M, N]; grad: [M, K]
  bool accumulate;    // out += instead of out =
};

struct CrossEntropyCall {
  MatrixView shard;
  int64_t first_row;
  const float* hidden;     // [T, D]
  const int64_t* targets;  // [T]; one outside every shard gives its token a wrong loss and nothing else
  int64_t num_tokens;
  Precision precision;
  float *running_max, *running_sum, *target_logit;  // [T]
  float *grad, *target_row;                         // [T, D] or both null
};

struct FinishCall {
  int64_t num_tokens, hidden_size;
  const float *running_max, *running_sum, *target_logit, *token_weight;  // [T]; token_weight may be null
  float *loss, *grad;                                                    // [T], [T, D] or null
  const float* target_row;
};

struct EncodeCall {
  const float* hidden;  // [T, D]
  int64_t num_tokens, hidden_size;
  BottleneckView adapter;  // width 0: none
  CacheFormat format;
  uint8_t* records;  // [T, record_bytes]
  int64_t record_bytes;
};

struct DecodeCall {
  const uint8_t* records;  // [T, record_bytes]
  int64_t num_tokens, hidden_size, record_bytes;
  CacheFormat format;
  const int64_t* out_rows;  // [T]; rows outside [0, num_rows) are passed over
  float* out;               // [num_rows, D]
  int64_t num_rows;
};

}  // namespace chainfed::cuda

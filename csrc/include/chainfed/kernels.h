// The core's kernels, one declaration each. Valid input is assumed: csrc/bind checks shapes, dtypes, alignment
// and aliasing before it calls. Every kernel writes only `out`-like arguments and `workspace`; none keeps a
// pointer or allocates. Letters: M tokens, N out features, K in features, T labelled tokens, D hidden, V vocabulary.
// Results of a row do not depend on the other rows or on the number of threads.
#pragma once
#include <cstddef>
#include <cstdint>

#include "chainfed/block_format.h"

namespace chainfed {

// ---- quant/ ----------------------------------------------------------------------------------------------
// Quantise a block of rows. weight f32 [num_rows, num_cols] row-major; codes/scales sized by codes_bytes/
// scales_bytes of exactly these rows. int4 searches scale and offset for least squared error; int8 is symmetric
// absmax/127; nf4 gives bitsandbytes' codes and absmax when K is a multiple of 64; bf16 rounds to nearest even.
// Non-finite weights throw InvalidArgument naming the row and column. The one kernel that allocates: eight rows of f32
// a thread.
void quantize_blocks(const float* weight /*[N,K]*/, int64_t num_rows, int64_t num_cols, BlockFormat format, void* codes,
                     void* scales);
// Decode rows [row_begin, row_end) to f32 row-major.
void dequantize_rows(const MatrixView& w, int64_t row_begin, int64_t row_end, float* out /*[rows,K]*/);
// GGUF blocks taken over without loss. A Q4_1 block is 32 inputs of one row: f16 d, f16 m, 16 bytes whose low nibbles
// are the first 16 inputs and high nibbles the last 16, w = d q + m. A Q8_0 block: f16 d, 32 int8, w = d q. Both are
// the rows of an int4 (int8) tile in another order; a Q8_0 code of -128 is kept. num_cols is a multiple of 32. A scale
// that is not finite throws CorruptFile naming row and block; codes and scales are then half written.
constexpr int64_t kQ41BlockBytes = 20;
constexpr int64_t kQ80BlockBytes = 34;
void repack_q4_1(const uint8_t* blocks /*[N,K/32*20]*/, int64_t num_rows, int64_t num_cols, uint8_t* codes,
                 uint16_t* scales);
void repack_q8_0(const uint8_t* blocks /*[N,K/32*34]*/, int64_t num_rows, int64_t num_cols, int8_t* codes,
                 uint16_t* scales);
// out[t] = row row_ids[t] of w: the embedding lookup. row_ids in [0, N) (checked by the binding).
void gather_rows(const MatrixView& w, const int64_t* row_ids /*[M]*/, int64_t num_ids, float* out /*[M,K]*/);

// ---- gemm/ -----------------------------------------------------------------------------------------------
// Whether activations are quantised to int8 per 32 inputs before an integer dot (faster; cosine >= 0.9999 of the
// f32 result) or the weights are decoded and multiplied in f32.
enum class Activation : uint8_t { int8, f32 };
// out = x W^T + bias.  2MNK FLOP, reads codes+scales once per 256 rows of x.
void linear_forward(const MatrixView& w, const float* x /*[M,K]*/, int64_t num_tokens, const float* bias /*[N]|null*/,
                    Activation activation, float* out /*[M,N]*/, void* workspace);
// out = grad_out W.  The base is frozen: there is no weight gradient and no function for one.
void linear_grad_input(const MatrixView& w, const float* grad_out /*[M,N]*/, int64_t num_tokens, float* out /*[M,K]*/,
                       void* workspace);
int64_t linear_forward_workspace_bytes(BlockFormat format, int64_t num_tokens, int64_t num_rows, int64_t num_cols);
int64_t linear_grad_input_workspace_bytes(BlockFormat format, int64_t num_tokens, int64_t num_rows, int64_t num_cols);

// ---- head/ -----------------------------------------------------------------------------------------------
// Softmax cross-entropy against a frozen head without logits, one shard of vocabulary rows at a time (the head may
// be streamed). Online softmax: call update once per shard in any fixed order, then finish once.
//   running_max [T] starts at -inf, running_sum [T] at 0, target_logit [T] at 0, grad/target_row [T,D] at 0.
//   With grad == null only the loss is computed (then target_row is null too).
// update:  z = hidden shard^T ; folds exp(z - max) into running_sum and, with grad, exp(z - max) * shard into grad for
//          every row but the target's; tokens whose target lies in [first_row, first_row + N) get target_logit and
//          target_row. Targets are >= 0; that each lies in some shard is the caller's to see.
// finish:  loss[t] = max + log(sum) - target_logit ;
//          grad[t] = token_weight[t] * (grad[t] / sum[t] + (exp(target_logit - max) / sum - 1) * target_row[t]).
// A token whose hidden state or logits are not finite gets a NaN loss and gradient, alone. The far tail of the softmax
// is summed exactly but enters grad through means of 128 rows: head/cell.h states the bound.
void cross_entropy_update(const MatrixView& shard, int64_t first_row, const float* hidden /*[T,D]*/,
                          const int64_t* targets /*[T] in [0,V)*/, int64_t num_tokens, Activation activation,
                          float* running_max /*[T]*/, float* running_sum /*[T]*/, float* target_logit /*[T]*/,
                          float* grad /*[T,D]|null*/, float* target_row /*[T,D]|null*/, void* workspace);
void cross_entropy_finish(int64_t num_tokens, int64_t hidden_size, const float* running_max, const float* running_sum,
                          const float* target_logit, const float* token_weight /*[T]|null*/, float* loss /*[T]*/,
                          float* grad /*[T,D]|null*/, const float* target_row /*[T,D]|null*/);
int64_t cross_entropy_workspace_bytes(BlockFormat format, int64_t num_tokens, int64_t num_rows, int64_t hidden_size);

// ---- boundary/ -------------------------------------------------------------------------------------------
// One record a token, of fixed size, so that a token is found by multiplication:
//   int8  i8 codes [D] (groups of 64, padded up to a multiple of 64), f16 scale [ceil(D/64)],
//         then num_outliers(D) x {u16 column, f32 value}: the largest magnitudes, kept exactly and coded as 0 in
//         their group; column 0xFFFF = unused. num_outliers(D) = max(1, D / 128).
//   bf16  bf16 [D]          f32  f32 [D]
enum class CacheFormat : uint8_t { int8, bf16, f32 };
int64_t record_bytes(CacheFormat format, int64_t hidden_size);
// A bottleneck adapter: h + up(gelu(down(h))), exact (erf) GELU.
struct BottleneckView {
  int64_t width;             // R
  const float* down_weight;  // [R, D]
  const float* down_bias;    // [R]
  const float* up_weight;    // [D, R]
  const float* up_bias;      // [D]
};
// Apply the adapter (null: none) and encode token by token; hidden is not changed.
void boundary_encode(const float* hidden /*[T,D]*/, int64_t num_tokens, int64_t hidden_size,
                     const BottleneckView* adapter, CacheFormat format, uint8_t* records /*[T,record_bytes]*/);
// out[out_rows[t]] = decode(records[t]): decode packed records and scatter them to the rows of a padded batch.
void boundary_decode(const uint8_t* records /*[T,record_bytes]*/, int64_t num_tokens, int64_t hidden_size,
                     CacheFormat format, const int64_t* out_rows /*[T]*/, float* out /*[*,D]*/);

}  // namespace chainfed

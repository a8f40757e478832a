#include "cuda/head.h"

#include <algorithm>

#include "cuda/fused.h"
#include "cuda/head_kernels.h"
#include "cuda/weights.h"

namespace chainfed::cuda {
namespace {

constexpr int64_t kMaxChunkTokens = 1024;
constexpr int64_t kTileWeights = int64_t{3}
                                 << 20;  // tokens x vocabulary rows of a tile, 4 bytes logits and 2 weights each
constexpr int64_t kMaxTileRows = 32768, kMinTileRows = 256;

int64_t tile_rows(int64_t num_tokens, int64_t num_rows) {
  const int64_t wanted = kTileWeights / num_tokens / kMinTileRows * kMinTileRows;
  return std::min(std::max(kMinTileRows, std::min(wanted, kMaxTileRows)), round_up_to(num_rows, 8));
}

// Whether the softmax weights go to the tensor cores as halves in tile order, without a copy in between. num_tokens: of
// the whole call, so that all its chunks take the same way.
bool is_fused(const Device& device, BlockFormat format, int64_t num_tokens) {
  return is_tiled(format) && (device.library == nullptr || num_tokens < device.library_from_tokens);
}

// What num_splits can ask for at most: two blocks a processor, of 64 x 256 or 128 x 128 results.
int64_t most_partial_floats(const Device& device) {
  return std::min<int64_t>(kMaxPartialBytes / 4, int64_t{2} * device.num_processors * 128 * 128);
}

struct Pieces {
  float* logits;       // [tokens, tile]
  uint16_t* halves;    // softmax weights in tile order
  float* row_scale;    // of the halves
  uint16_t* prepared;  // hidden rows in tile order, once a chunk
  float* prepared_scale;
  float* partial;
  void* linear;
};

Pieces carve(Workspace& workspace, const Device& device, BlockFormat format, int64_t num_tokens, int64_t num_rows,
             int64_t hidden_size) {
  const int64_t tokens = std::min(num_tokens, kMaxChunkTokens), rows = std::min(num_rows, tile_rows(tokens, num_rows));
  Pieces pieces{};
  pieces.logits = workspace.take<float>(tokens * rows);
  int64_t bytes = 0;
  if (is_fused(device, format, num_tokens)) {
    pieces.halves = workspace.take<uint16_t>(tokens * round_up_to(rows, kStepCols));
    pieces.row_scale = workspace.take<float>(tokens);
    pieces.prepared = workspace.take<uint16_t>(tokens * round_up_to(hidden_size, kStepCols));
    pieces.prepared_scale = workspace.take<float>(tokens);
    pieces.partial = workspace.take<float>(most_partial_floats(device));
  } else {
    for (Direction direction : {Direction::forward, Direction::grad}) {
      bytes = std::max(bytes, linear_workspace_bytes(device, format, direction, tokens, rows, hidden_size));
    }
  }
  pieces.linear = workspace.take<char>(bytes);
  return pieces;
}

// One tile of vocabulary rows for one chunk of tokens; `call` is the chunk's.
void update_tile(const Device& device, Stream stream, const CrossEntropyCall& call, const MatrixView& tile,
                 int64_t first_row, bool fused, const Pieces& pieces) {
  const int64_t hidden_size = tile.num_cols, cols = round_up_to(tile.num_rows, kStepCols);
  if (fused) {
    fused_linear(device, stream,
                 {tile, Direction::forward, pieces.prepared, round_up_to(hidden_size, kStepCols), pieces.prepared_scale,
                  call.num_tokens, nullptr, pieces.logits, false, pieces.partial});
  } else {
    linear(device, stream,
           {tile, Direction::forward, call.precision, call.hidden, call.num_tokens, nullptr, pieces.logits, false},
           pieces.linear);
  }
  const bool halves = fused && call.grad != nullptr;
  launch<SoftmaxTile>(
      stream, SoftmaxTile::grid(call.num_tokens),
      {pieces.logits, tile.num_rows, first_row, call.targets, call.running_max, call.running_sum, call.target_logit,
       halves ? pieces.halves : nullptr, cols, pieces.row_scale, call.grad, hidden_size, call.grad != nullptr});
  if (call.grad == nullptr) return;
  if (fused) {
    fused_linear(device, stream,
                 {tile, Direction::grad, pieces.halves, cols, pieces.row_scale, call.num_tokens, nullptr, call.grad,
                  true, pieces.partial});
  } else {
    linear(device, stream,
           {tile, Direction::grad, call.precision, pieces.logits, call.num_tokens, nullptr, call.grad, true},
           pieces.linear);
  }
}

}  // namespace

void cross_entropy_update(const Device& device, Stream stream, const CrossEntropyCall& call, void* memory) {
  if (call.num_tokens == 0) return;
  const MatrixView& shard = call.shard;
  const int64_t hidden_size = shard.num_cols;
  Workspace workspace(memory);
  const Pieces pieces = carve(workspace, device, shard.format, call.num_tokens, shard.num_rows, hidden_size);
  const int64_t rows = tile_rows(std::min(call.num_tokens, kMaxChunkTokens), shard.num_rows);
  const bool fused = call.precision == Precision::fast && is_fused(device, shard.format, call.num_tokens);
  for (int64_t t = 0; t < call.num_tokens; t += kMaxChunkTokens) {
    CrossEntropyCall chunk = call;
    chunk.num_tokens = std::min(kMaxChunkTokens, call.num_tokens - t);
    chunk.hidden += t * hidden_size;
    chunk.targets += t;
    chunk.running_max += t;
    chunk.running_sum += t;
    chunk.target_logit += t;
    if (call.grad != nullptr) chunk.grad += t * hidden_size;
    if (fused) {
      launch<Prepare>(stream, Prepare::grid(chunk.num_tokens),
                      {chunk.hidden, chunk.num_tokens, hidden_size, round_up_to(hidden_size, kStepCols),
                       Direction::forward, pieces.prepared, pieces.prepared_scale});
    }
    for (int64_t row = 0; row < shard.num_rows; row += rows) {
      update_tile(device, stream, chunk, rows_of(shard, row, std::min(rows, shard.num_rows - row)),
                  call.first_row + row, fused, pieces);
    }
  }
  if (call.grad == nullptr) return;
  launch<GatherRows>(stream, GatherRows::grid(call.num_tokens),
                     {shard, tiles_in_row(shard.format, hidden_size), call.first_row, call.targets, call.target_row});
}

void cross_entropy_finish(Stream stream, const FinishCall& call) {
  launch<FinishLoss>(stream, FinishLoss::grid(call.num_tokens), call);
}

int64_t cross_entropy_workspace_bytes(const Device& device, BlockFormat format, int64_t num_tokens, int64_t num_rows,
                                      int64_t hidden_size) {
  if (num_tokens <= 0) return 0;
  Workspace workspace(nullptr);
  carve(workspace, device, format, num_tokens, num_rows, hidden_size);
  return workspace.used_bytes();
}

}  // namespace chainfed::cuda

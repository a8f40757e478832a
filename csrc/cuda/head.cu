#include "cuda/head.h"

#include <algorithm>

#include "cuda/fused.h"
#include "cuda/head_kernels.h"
#include "cuda/library_product.h"
#include "cuda/prepare.h"
#include "cuda/weights.h"

namespace chainfed::cuda {
namespace {

// Tokens x vocabulary rows of a tile, 4 bytes logits and 2 weights each; the library's way has the decoded rows and the
// hidden ones beside them, within kLibraryTileBytes.
constexpr int64_t kMaxChunkTokens = 1024, kTileWeights = int64_t{3} << 20;
constexpr int64_t kLibraryTileBytes = int64_t{55} << 20;
constexpr int64_t kMaxTileRows = 32768, kMinTileRows = 256;

// plain: two products in f32. fused: the softmax weights go to the tensor cores as halves in tile order, without a copy
// in between. library: a tile of rows is decoded once for both products.
enum class Way : uint8_t { plain, fused, library };

// num_tokens: of the whole call, so that all its chunks take the same way.
Way way_of(const Device& device, BlockFormat format, int64_t num_tokens, Precision precision) {
  if (precision == Precision::exact) return Way::plain;
  const bool many = !is_tiled(format) || num_tokens >= device.library_from_tokens;
  if (device.library != nullptr && many) return Way::library;
  return is_tiled(format) ? Way::fused : Way::plain;
}

// What num_splits can ask for at most: two blocks a processor, of 64 x 256 or 128 x 128 results.
int64_t most_partial_floats(const Device& device) {
  return std::min<int64_t>(kMaxPartialBytes / 4, int64_t{2} * device.num_processors * 128 * 128);
}

struct Tiling {
  int64_t chunk, rows;  // tokens and vocabulary rows at a time
};

// Rows of 4096 and less let 2048 tokens share a tile of as many rows: 128 results of 128 x 256, a wave of an H100.
Tiling tiling_of(Way way, int64_t num_tokens, int64_t num_rows, int64_t hidden_size) {
  const int64_t most = way == Way::library && hidden_size <= 4096 ? 2 * kMaxChunkTokens : kMaxChunkTokens;
  const int64_t chunk = std::min(num_tokens, most);
  int64_t rows = kTileWeights / chunk;
  if (way == Way::library) {
    const int64_t stride = round_up_to(hidden_size, 8);
    rows = (kLibraryTileBytes - 2 * chunk * stride) / (6 * chunk + 2 * stride);
  }
  rows = std::max(kMinTileRows, std::min(rows, kMaxTileRows) / kMinTileRows * kMinTileRows);
  return {chunk, std::min(rows, num_rows)};
}

struct Pieces {
  float* logits;       // [chunk, rows]
  uint16_t* packed;    // softmax weights: in tile order (fused), bf16 (library)
  uint16_t* prepared;  // hidden rows, once a chunk: in tile order (fused), bf16 (library)
  // fused
  float *row_scale, *prepared_scale, *partial;
  // library
  uint16_t* decoded;  // [rows, stride]; null where the shard is bf16 and can be read as it is
  void* own;
};

Pieces carve(Workspace& workspace, const Device& device, BlockFormat format, int64_t num_tokens, int64_t num_rows,
             int64_t hidden_size) {
  const Way way = way_of(device, format, num_tokens, Precision::fast);
  const Tiling tiling = tiling_of(way, num_tokens, num_rows, hidden_size);
  const int64_t multiple = way == Way::library ? 8 : kStepCols, width = round_up_to(hidden_size, multiple);
  Pieces pieces{};
  pieces.logits = workspace.take<float>(tiling.chunk * tiling.rows);
  if (way == Way::plain) return pieces;
  pieces.packed = workspace.take<uint16_t>(tiling.chunk * round_up_to(tiling.rows, multiple));
  pieces.prepared = workspace.take<uint16_t>(tiling.chunk * width);
  if (way == Way::fused) {
    pieces.row_scale = workspace.take<float>(tiling.chunk);
    pieces.prepared_scale = workspace.take<float>(tiling.chunk);
    pieces.partial = workspace.take<float>(most_partial_floats(device));
    return pieces;
  }
  const bool in_place = format == BlockFormat::bf16 && width == hidden_size;
  if (!in_place) pieces.decoded = workspace.take<uint16_t>(tiling.rows * width);
  pieces.own = workspace.take<char>(kLibraryWorkspaceBytes);
  return pieces;
}

// One chunk of tokens and what a product of it with a tile of vocabulary rows needs.
struct Chunk {
  const Device& device;
  Stream stream;
  CrossEntropyCall call;
  Way way;
  Pieces pieces;
  int64_t hidden_size;

  void prepare() const {
    if (way == Way::fused) {
      launch<Prepare>(stream, Prepare::grid(call.num_tokens),
                      {call.hidden, call.num_tokens, hidden_size, round_up_to(hidden_size, kStepCols),
                       Direction::forward, pieces.prepared, pieces.prepared_scale});
    } else if (way == Way::library) {
      launch<ToBf16>(stream, ToBf16::grid(call.num_tokens),
                     {call.hidden, hidden_size, round_up_to(hidden_size, 8), pieces.prepared});
    }
  }

  void logits(const MatrixView& tile, const uint16_t* decoded) const {
    if (way == Way::fused) {
      fused_linear(device, stream,
                   {tile, Direction::forward, pieces.prepared, round_up_to(hidden_size, kStepCols),
                    pieces.prepared_scale, call.num_tokens, nullptr, pieces.logits, false, pieces.partial});
    } else if (way == Way::library) {
      const int64_t stride = round_up_to(hidden_size, 8);
      library_product(device.library, stream,
                      {Direction::forward, decoded, tile.num_rows, hidden_size, stride, pieces.prepared,
                       call.num_tokens, stride, nullptr, pieces.logits, tile.num_rows, false, pieces.own});
    } else {
      linear(device, stream,
             {tile, Direction::forward, Precision::exact, call.hidden, call.num_tokens, nullptr, pieces.logits, false},
             nullptr);
    }
  }

  void grad(const MatrixView& tile, const uint16_t* decoded, int64_t cols) const {
    if (way == Way::fused) {
      fused_linear(device, stream,
                   {tile, Direction::grad, pieces.packed, cols, pieces.row_scale, call.num_tokens, nullptr, call.grad,
                    true, pieces.partial});
    } else if (way == Way::library) {
      library_product(device.library, stream,
                      {Direction::grad, decoded, tile.num_rows, hidden_size, round_up_to(hidden_size, 8), pieces.packed,
                       call.num_tokens, cols, nullptr, call.grad, hidden_size, true, pieces.own});
    } else {
      linear(device, stream,
             {tile, Direction::grad, Precision::exact, pieces.logits, call.num_tokens, nullptr, call.grad, true},
             nullptr);
    }
  }

  void update(const MatrixView& tile, int64_t first_row) const {
    const uint16_t* decoded = static_cast<const uint16_t*>(tile.codes);
    if (pieces.decoded != nullptr) {
      decode_rows(stream, tile, 0, tile.num_rows, round_up_to(hidden_size, 8), pieces.decoded);
      decoded = pieces.decoded;
    }
    logits(tile, decoded);
    WeightsAs as = way == Way::fused ? WeightsAs::halves : way == Way::library ? WeightsAs::bf16 : WeightsAs::floats;
    if (call.grad == nullptr) as = WeightsAs::none;
    const int64_t cols = round_up_to(tile.num_rows, way == Way::library ? 8 : kStepCols);
    launch<SoftmaxTile>(stream, SoftmaxTile::grid(call.num_tokens),
                        {pieces.logits, tile.num_rows, first_row, call.targets, call.running_max, call.running_sum,
                         call.target_logit, as, pieces.packed, cols, pieces.row_scale, call.grad, hidden_size});
    if (call.grad != nullptr) grad(tile, decoded, cols);
  }
};

}  // namespace

void cross_entropy_update(const Device& device, Stream stream, const CrossEntropyCall& call, void* memory) {
  if (call.num_tokens == 0) return;
  const MatrixView& shard = call.shard;
  const int64_t hidden_size = shard.num_cols;
  Workspace workspace(memory);
  const Pieces pieces = carve(workspace, device, shard.format, call.num_tokens, shard.num_rows, hidden_size);
  // The workspace is that of the fast way, whose tiles the exact one uses too.
  const Tiling tiling = tiling_of(way_of(device, shard.format, call.num_tokens, Precision::fast), call.num_tokens,
                                  shard.num_rows, hidden_size);
  Chunk chunk{device, stream, call, way_of(device, shard.format, call.num_tokens, call.precision), pieces, hidden_size};
  if (chunk.way != Way::library) chunk.pieces.decoded = nullptr;
  for (int64_t t = 0; t < call.num_tokens; t += tiling.chunk) {
    chunk.call.num_tokens = std::min(tiling.chunk, call.num_tokens - t);
    chunk.call.hidden = call.hidden + t * hidden_size;
    chunk.call.targets = call.targets + t;
    chunk.call.running_max = call.running_max + t;
    chunk.call.running_sum = call.running_sum + t;
    chunk.call.target_logit = call.target_logit + t;
    if (call.grad != nullptr) chunk.call.grad = call.grad + t * hidden_size;
    chunk.prepare();
    for (int64_t row = 0; row < shard.num_rows; row += tiling.rows) {
      chunk.update(rows_of(shard, row, std::min(tiling.rows, shard.num_rows - row)), call.first_row + row);
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

#include "chainfed/block_format.h"

#include <cstring>
#include <string>

#include "chainfed/error.h"

namespace chainfed {
namespace {

constexpr const char* kNames[] = {"int4", "nf4", "int8", "bf16", "f32"};

int64_t multiply(int64_t a, int64_t b) {
  int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) throw InvalidArgument("matrix size overflows 64 bits");
  return product;
}

int64_t round_up(int64_t value, int64_t multiple) {
  int64_t sum = 0;
  if (__builtin_add_overflow(value, multiple - 1, &sum)) throw InvalidArgument("matrix size overflows 64 bits");
  return sum / multiple * multiple;
}

void require_positive(int64_t num_rows, int64_t num_cols) {
  if (num_rows < 1 || num_cols < 1) {
    throw InvalidArgument("a matrix needs num_rows >= 1 and num_cols >= 1, got [" + std::to_string(num_rows) + ", " +
                          std::to_string(num_cols) + "]");
  }
}

bool is_tiled(BlockFormat format) { return format != BlockFormat::bf16 && format != BlockFormat::f32; }

int64_t num_tiles(BlockFormat format, int64_t num_rows, int64_t num_cols) {
  return multiply(padded_rows(format, num_rows) / kTileRows, padded_cols(format, num_cols) / kTileCols);
}

}  // namespace

int64_t padded_rows(BlockFormat format, int64_t num_rows) {
  return is_tiled(format) ? round_up(num_rows, kTileRows) : num_rows;
}

int64_t padded_cols(BlockFormat format, int64_t num_cols) {
  if (!is_tiled(format)) return num_cols;
  return round_up(num_cols, format == BlockFormat::nf4 ? kNf4BlockCols : kTileCols);
}

int64_t codes_bytes(BlockFormat format, int64_t num_rows, int64_t num_cols) {
  require_positive(num_rows, num_cols);
  switch (format) {
    case BlockFormat::int4:
    case BlockFormat::nf4:
      return multiply(num_tiles(format, num_rows, num_cols), kInt4TileBytes);
    case BlockFormat::int8:
      return multiply(num_tiles(format, num_rows, num_cols), kInt8TileBytes);
    case BlockFormat::bf16:
      return multiply(multiply(num_rows, num_cols), 2);
    case BlockFormat::f32:
      return multiply(multiply(num_rows, num_cols), 4);
  }
  throw InvalidArgument("unknown block format");
}

int64_t scales_bytes(BlockFormat format, int64_t num_rows, int64_t num_cols) {
  require_positive(num_rows, num_cols);
  switch (format) {
    case BlockFormat::int4:  // f16 scale and offset a row
      return multiply(num_tiles(format, num_rows, num_cols), 2 * kTileRows * 2);
    case BlockFormat::nf4:  // one f32 a row and two tiles
      return multiply(num_tiles(format, num_rows, num_cols) / 2, kTileRows * 4);
    case BlockFormat::int8:  // one f16 a row
      return multiply(num_tiles(format, num_rows, num_cols), kTileRows * 2);
    case BlockFormat::bf16:
    case BlockFormat::f32:
      return 0;
  }
  throw InvalidArgument("unknown block format");
}

BlockFormat parse_block_format(const char* name) {
  for (int i = 0; i < 5; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return static_cast<BlockFormat>(i);
  }
  throw InvalidArgument(std::string("block_format must be int4, nf4, int8, bf16 or f32, got ") + name);
}

const char* block_format_name(BlockFormat format) { return kNames[static_cast<int>(format)]; }

}  // namespace chainfed

#include "chainfed/kernels.h"

#include <cstring>
#include <string>

#include "base/thread_pool.h"
#include "chainfed/error.h"

namespace chainfed {
namespace {

uint16_t finite_f16(const uint8_t* bytes, const char* function, int64_t row, int64_t block) {
  uint16_t value;
  std::memcpy(&value, bytes, sizeof value);
  if ((value & 0x7C00u) == 0x7C00u) {
    throw CorruptFile(std::string(function) + ": the scale of row " + std::to_string(row) + ", block " +
                      std::to_string(block) + " is not finite");
  }
  return value;
}

}  // namespace

void repack_q4_1(const uint8_t* blocks, int64_t num_rows, int64_t num_cols, uint8_t* codes, uint16_t* scales) {
  const int64_t num_tiles = num_cols / kTileCols;
  const int64_t num_runs = padded_rows(BlockFormat::int4, num_rows) / kTileRows;
  parallel_for(num_runs * num_tiles, [&](int64_t tile) {
    const int64_t run = tile / num_tiles, block = tile % num_tiles;
    uint8_t* tile_codes = codes + tile * kInt4TileBytes;
    uint16_t* tile_scales = scales + tile * 2 * kTileRows;
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t row = run * kTileRows + r;
      uint8_t nibbles[16] = {};
      tile_scales[r] = tile_scales[kTileRows + r] = 0;
      if (row < num_rows) {
        const uint8_t* source = blocks + (row * num_tiles + block) * kQ41BlockBytes;
        tile_scales[r] = finite_f16(source, "repack_q4_1", row, block);
        tile_scales[kTileRows + r] = finite_f16(source + 2, "repack_q4_1", row, block);
        std::memcpy(nibbles, source + 4, sizeof nibbles);
      }
      for (int64_t j = 0; j < 4; ++j) std::memcpy(tile_codes + j * 32 + r * 4, nibbles + 4 * j, 4);
    }
  });
}

void repack_q8_0(const uint8_t* blocks, int64_t num_rows, int64_t num_cols, int8_t* codes, uint16_t* scales) {
  const int64_t num_tiles = num_cols / kTileCols;
  const int64_t num_runs = padded_rows(BlockFormat::int8, num_rows) / kTileRows;
  parallel_for(num_runs * num_tiles, [&](int64_t tile) {
    const int64_t run = tile / num_tiles, block = tile % num_tiles;
    int8_t* tile_codes = codes + tile * kInt8TileBytes;
    uint16_t* tile_scales = scales + tile * kTileRows;
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t row = run * kTileRows + r;
      uint8_t bytes[32] = {};
      tile_scales[r] = 0;
      if (row < num_rows) {
        const uint8_t* source = blocks + (row * num_tiles + block) * kQ80BlockBytes;
        tile_scales[r] = finite_f16(source, "repack_q8_0", row, block);
        std::memcpy(bytes, source + 2, sizeof bytes);
      }
      for (int64_t j = 0; j < 8; ++j) std::memcpy(tile_codes + j * 32 + r * 4, bytes + 4 * j, 4);
    }
  });
}

}  // namespace chainfed

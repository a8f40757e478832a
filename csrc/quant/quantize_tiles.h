// Quantising one run of eight rows, a version a SIMD level. All versions run the same additions and multiplications in
// the same order without contraction, so that a store has the same bits on every machine.
#pragma once
#include <cstdint>

namespace chainfed {

// columns f32 [num_tiles * 32][8]: eight rows, transposed, zero padded. codes and scales: num_tiles tiles.
// Returns false when a scale or offset does not fit f16.
struct QuantizeTiles {
  bool (*int4)(const float* columns, int64_t num_tiles, uint8_t* codes, uint16_t* scales);
  bool (*int8)(const float* columns, int64_t num_tiles, int8_t* codes, uint16_t* scales);
  void (*nf4)(const float* columns, int64_t num_tiles, uint8_t* codes, float* scales);
};
extern const QuantizeTiles kQuantizeTilesScalar, kQuantizeTilesAvx2, kQuantizeTilesNeon;

}  // namespace chainfed

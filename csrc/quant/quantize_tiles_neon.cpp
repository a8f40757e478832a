#include "quant/quantize_tiles.h"

#include "quant/quantize_tiles-inl.h"

namespace chainfed {

const QuantizeTiles kQuantizeTilesNeon = {&quantize_int4, &quantize_int8, &quantize_nf4};

}  // namespace chainfed

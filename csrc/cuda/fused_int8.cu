#include "cuda/fused.h"

namespace chainfed::cuda {

void fused_int8(const Device& device, Stream stream, const FusedCall& call) {
  fused_format<BlockFormat::int8>(device, stream, call);
}

}  // namespace chainfed::cuda

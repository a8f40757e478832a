#include "cuda/fused.h"

namespace chainfed::cuda {

void fused_int4(const Device& device, Stream stream, const FusedCall& call) {
  fused_format<BlockFormat::int4>(device, stream, call);
}

}  // namespace chainfed::cuda

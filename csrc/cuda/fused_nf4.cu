#include "cuda/fused.h"

namespace chainfed::cuda {

void fused_nf4(const Device& device, Stream stream, const FusedCall& call) {
  fused_format<BlockFormat::nf4>(device, stream, call);
}

}  // namespace chainfed::cuda

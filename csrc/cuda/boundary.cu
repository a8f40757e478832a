#include "cuda/boundary.h"

#include "cuda/boundary_kernels.h"

namespace chainfed::cuda {

void boundary_encode(Stream stream, const EncodeCall& call) {
  const EncodeArgs args{call, Encode::tokens_of_block(call.hidden_size, call.adapter.width)};
  launch<Encode>(stream, Encode::grid(args), args, Encode::shared_bytes(call.hidden_size, call.adapter.width));
}

void boundary_decode(Stream stream, const DecodeCall& call) {
  launch<Decode>(stream, Decode::grid(call.num_tokens), call);
}

}  // namespace chainfed::cuda

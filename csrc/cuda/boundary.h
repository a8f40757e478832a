// The boundary codec on a device; the CPU's contract (kernels.h), pointers on the device.
#pragma once
#include <cstdint>

#include "chainfed/kernels.h"
#include "cuda/launch.h"

namespace chainfed::cuda {

void boundary_encode(Stream stream, const EncodeCall& call);
void boundary_decode(Stream stream, const DecodeCall& call);

}  // namespace chainfed::cuda

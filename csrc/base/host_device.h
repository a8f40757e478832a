// Marks inline functions that both the CPU core and CUDA device code call, so that index and codec arithmetic stands
// once and is tested on the CPU.
#pragma once

#ifdef __CUDACC__
#define CHAINFED_HOST_DEVICE __host__ __device__
#else
#define CHAINFED_HOST_DEVICE
#endif

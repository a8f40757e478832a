// Starting a kernel: launch<Kernel>(stream, grid, args) of device.h's kernel structs, by the CUDA runtime or by the
// emulator. Never synchronises or allocates; a refused launch throws.
#pragma once
#include <string>

#include "chainfed/error.h"
#include "cuda/calls.h"
#include "cuda/device.h"

namespace chainfed::cuda {

// What every architecture of the build grants a block at least: sm_86 and sm_89 99 KiB, sm_80 and sm_87 163, sm_90 227.
constexpr int kMaxSharedBytes = 99 << 10;

// False: nothing to do. Throws for what no device can start.
template <typename Kernel>
bool is_launchable(Grid grid, int shared_bytes) {
  static_assert(Kernel::kSharedBytes <= kMaxSharedBytes && Kernel::kThreads % kWarp == 0 && Kernel::kThreads <= 1024);
  static_assert(sizeof(typename Kernel::Args) <= 4096, "more than a launch carries");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return false;
  if (grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535) throw InvalidArgument("CUDA: the call is too large");
  if (shared_bytes > kMaxSharedBytes) {
    throw InvalidArgument("CUDA: a row of this size needs " + std::to_string(shared_bytes) +
                          " bytes of shared memory, expected at most " + std::to_string(kMaxSharedBytes));
  }
  return true;
}

}  // namespace chainfed::cuda

#ifdef __CUDACC__
#include <cuda_runtime_api.h>

namespace chainfed::cuda {

// Throws the chainfed error that fits: what failed, CUDA's words, what to do.
void check(cudaError_t status, const char* what);

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks) run_kernel(const typename Kernel::Args args) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  Kernel::run(args, dynamic_shared);
}

template <typename Kernel>
void launch(Stream stream, Grid grid, const typename Kernel::Args& args, int shared_bytes = Kernel::kSharedBytes) {
  if (!is_launchable<Kernel>(grid, shared_bytes)) return;
  if (shared_bytes > 48 << 10) {  // a host-side setting of the function, allowed while a graph is captured
    check(cudaFuncSetAttribute(run_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          "shared memory of a kernel");
  }
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  run_kernel<Kernel>
      <<<blocks, Kernel::kThreads, static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)>>>(args);
  check(cudaGetLastError(), "launch of a kernel");
}

}  // namespace chainfed::cuda

#else

namespace chainfed::cuda {

template <typename Kernel>
void launch(Stream, Grid grid, const typename Kernel::Args& args, int shared_bytes = Kernel::kSharedBytes) {
  if (!is_launchable<Kernel>(grid, shared_bytes)) return;
  emulator::run_grid(grid, Kernel::kThreads, shared_bytes, [&](unsigned char* shared) { Kernel::run(args, shared); });
}

}  // namespace chainfed::cuda

#endif

// Everything a CUDA kernel of this folder may use, so that one source is both the device code and what the tests run on
// a CPU. Compiled by nvcc the functions are PTX; compiled by a C++ compiler they are those of emulator.h, which runs
// every thread of a block as a fiber and follows the fragment layouts of the PTX manual.
//
// A kernel is a struct: Args (passed by value), kThreads, kMinBlocks (blocks an SM should hold, for the register
// allocation) and a static run(args, shared). It must keep whole warps together at every function named warp_*, at
// mma_f16 and at sync_warp, and all threads at sync_threads: the emulator reports a deadlock otherwise.
// Halves are passed as their bits: uint16_t, or two of them in a uint32_t with the lower-numbered one in the low bits.
#pragma once
#include <cstdint>

#include "base/half.h"
#include "base/host_device.h"

namespace chainfed::cuda {

struct alignas(16) Uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) Uint2 {
  uint32_t x, y;
};
// Sizes of a grid in blocks.
struct Grid {
  int64_t x = 1, y = 1, z = 1;
};
constexpr int kWarp = 32;

}  // namespace chainfed::cuda

#ifndef __CUDACC__
#include "cuda/emulator.h"
#else

#define CHAINFED_DEVICE __device__ __forceinline__
#define CHAINFED_UNROLL _Pragma("unroll")

namespace chainfed::cuda {

CHAINFED_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
CHAINFED_DEVICE int num_threads() { return static_cast<int>(blockDim.x); }
CHAINFED_DEVICE int64_t block_x() { return blockIdx.x; }
CHAINFED_DEVICE int64_t block_y() { return blockIdx.y; }
CHAINFED_DEVICE int64_t block_z() { return blockIdx.z; }
CHAINFED_DEVICE void sync_threads() { __syncthreads(); }
CHAINFED_DEVICE void sync_warp() { __syncwarp(); }

// The value of the lane whose number differs by `mask`.
CHAINFED_DEVICE float warp_xor(float value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }
CHAINFED_DEVICE uint32_t warp_max(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xFFFFFFFFu, value);
#else
  return value;  // never launched: the build refuses architectures below 8.0
#endif
}
CHAINFED_DEVICE uint32_t warp_min(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_min_sync(0xFFFFFFFFu, value);
#else
  return value;
#endif
}

// 16 bytes from global to shared memory in the background, zeros when not `valid`; both addresses are multiples of 16.
// Visible to this thread after copy_async_wait, to others after sync_threads as well. Passes by the L1 cache.
CHAINFED_DEVICE void copy_async16(void* shared, const void* global, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}
CHAINFED_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of the committed groups are in flight.
template <int kPending>
CHAINFED_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// d += a * b: a 16 x 16 row-major, b 16 x 8 column-major halves, d 16 x 8 floats (mma.sync.m16n8k16). Lane = 4 g + t
// holds  a: rows g, g + 8 (registers 0/2, 1/3), columns 2t, 2t + 1 (0, 1) and 8 + 2t, 9 + 2t (2, 3)
//        b: column g, rows 2t, 2t + 1 (0) and 8 + 2t, 9 + 2t (1)      d: rows g (0, 1), g + 8 (2, 3), columns 2t, 2t +
//        1
CHAINFED_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

CHAINFED_DEVICE uint16_t half_bits(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
CHAINFED_DEVICE float half_value(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
// Two floats as bf16, `low` in the low bits.
CHAINFED_DEVICE uint32_t bf16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
CHAINFED_DEVICE uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
CHAINFED_DEVICE uint32_t half2_mul(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
CHAINFED_DEVICE uint32_t half2_add(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// Four of the eight bytes of low (0-3) and high (4-7), one selecting nibble a byte.
CHAINFED_DEVICE uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}
// (value & mask) | bits, one instruction.
CHAINFED_DEVICE uint32_t mask_or(uint32_t value, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(value), "r"(mask), "r"(bits));
  return result;
}

// Without contraction or approximation: the codec gives the same bits as the CPU's.
CHAINFED_DEVICE float exact_mul(float a, float b) { return __fmul_rn(a, b); }
CHAINFED_DEVICE float round_even(float value) { return rintf(value); }
CHAINFED_DEVICE float exponential(float value) { return expf(value); }
CHAINFED_DEVICE float logarithm(float value) { return logf(value); }
CHAINFED_DEVICE float complementary_erf(float value) { return erfcf(value); }
CHAINFED_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

}  // namespace chainfed::cuda
#endif

// The CUDA library as the core's module sees it: a table of C functions in a shared library of its own, opened when the
// first CUDA array comes. So the module is the same file with and without CUDA and imports on machines without a
// driver, and tests put another library in its place. Every function returns a Status and leaves a text in `message`
// unless it is ok; none throws, synchronises (except where said) or allocates device memory.
#pragma once
#include <cstdint>

#include "cuda/calls.h"

namespace chainfed::cuda {

constexpr uint32_t kTableVersion = 2;

enum class Status : int32_t { ok, invalid_argument, unsupported_hardware, out_of_memory, failed };
struct Message {
  char text[512];
};

struct DeviceInfo {
  char name[128];
  int32_t architecture;  // 87 for compute capability 8.7
  int32_t num_processors;
  int32_t is_unified;   // CPU and GPU share one memory (Jetson)
  int32_t has_library;  // cuBLASLt was found
  int64_t total_bytes, free_bytes;
  int64_t library_from_tokens;              // INT64_MAX: never
  int32_t driver_version, runtime_version;  // 12060 for 12.6
};

struct Table {
  uint32_t version;
  uint32_t table_bytes;
  const char* architectures;  // built for, as "80,87,89,90"
  Status (*num_devices)(int32_t* count, Message* message);
  Status (*device_info)(int32_t device, DeviceInfo* info, Message* message);
  Status (*set_library_from_tokens)(int32_t device, int64_t tokens, Message* message);
  Status (*linear)(int32_t device, Stream stream, const LinearCall* call, void* workspace, Message* message);
  Status (*linear_workspace_bytes)(int32_t device, BlockFormat format, Direction direction, int64_t num_tokens,
                                   int64_t num_rows, int64_t num_cols, int64_t* bytes, Message* message);
  Status (*cross_entropy_update)(int32_t device, Stream stream, const CrossEntropyCall* call, void* workspace,
                                 Message* message);
  Status (*cross_entropy_finish)(int32_t device, Stream stream, const FinishCall* call, Message* message);
  Status (*cross_entropy_workspace_bytes)(int32_t device, BlockFormat format, int64_t num_tokens, int64_t num_rows,
                                          int64_t hidden_size, int64_t* bytes, Message* message);
  Status (*boundary_encode)(int32_t device, Stream stream, const EncodeCall* call, Message* message);
  Status (*boundary_decode)(int32_t device, Stream stream, const DecodeCall* call, Message* message);
  // From host memory (pinned: in the background of the stream) to the device.
  Status (*copy_to_device)(int32_t device, Stream stream, void* to, const void* from_host, int64_t bytes,
                           Message* message);
  // Page-lock host memory and map it into the device's address space; both may wait for the device.
  Status (*pin)(int32_t device, void* host, int64_t bytes, Message* message);
  Status (*unpin)(int32_t device, void* host, Message* message);
  // The device's address of a byte of pinned memory.
  Status (*device_pointer)(int32_t device, const void* host, const void** pointer, Message* message);
};

}  // namespace chainfed::cuda

// The one symbol of the library.
extern "C" const chainfed::cuda::Table* chainfed_cuda_table();

// A CUDA runtime whose devices are made up: cuda:0 is an sm_90 with memory of its own, cuda:1 an sm_87 board that
// shares the CPU's. Device memory is host memory, a stream is any number but 666 (one of another context), a copy is
// done at once. CHAINFED_FAKE_CUDA in the environment changes it, read at every call, as "name=number;...":
//   devices, driver (12020 for 12.2), architecture (of cuda:0), and any function of the runtime, for the status that it
//   then returns: cudaHostRegister=2. CHAINFED_FAKE_CUDA_BUILT="90": the architectures of the build.
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "cuda_runtime_api.h"
#include "setting.h"

namespace {

using fake_cuda::setting;

// As in CUDA: an error stays until it is asked for.
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t result(const char* function, cudaError_t status = cudaSuccess) {
  const int wanted = setting(function, 0);
  if (wanted != 0) status = static_cast<cudaError_t>(wanted);
  if (status != cudaSuccess) last_error = status;
  return status;
}

// The current context of a thread: 0 none, else 1 + the device's number. What the driver keeps for every runtime of the
// process, torch's and ours.
thread_local intptr_t context = 0;
thread_local int chosen = 0;
bool has_context[8];

void make_current(int device) {
  chosen = device;
  context = 1 + device;
  has_context[device] = true;
}

int get_context(void** current) {
  *current = reinterpret_cast<void*>(context);
  return 0;
}
int set_context(void* current) {
  context = reinterpret_cast<intptr_t>(current);
  return 0;
}

// Work outside a chosen device starts one on the default device, as the real runtime does.
int working_device() {
  if (context == 0) make_current(chosen);
  return static_cast<int>(context - 1);
}

struct Range {
  size_t bytes;
  int device;
};
std::mutex mutex;
std::map<const char*, Range>& pinned() {
  static std::map<const char*, Range> ranges;
  return ranges;
}

int device_count() { return setting("devices", 2); }

}  // namespace

const char* fake_cuda_architectures() {
  const char* built = std::getenv("CHAINFED_FAKE_CUDA_BUILT");
  return built == nullptr ? "80,87,89,90" : built;
}

const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorHostMemoryNotRegistered:
      return "pointer does not correspond to a registered memory region";
    default:
      return "a CUDA error";
  }
}

cudaError_t cudaGetLastError() {
  const cudaError_t status = last_error;
  last_error = cudaSuccess;
  return status;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = setting("driver", 13000);
  return result("cudaDriverGetVersion");
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return result("cudaRuntimeGetVersion");
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  if (setting("driver", CUDART_VERSION) < CUDART_VERSION / 1000 * 1000) {
    return result("cudaGetDeviceCount", cudaErrorInsufficientDriver);
  }
  return result("cudaGetDeviceCount", *count == 0 ? cudaErrorNoDevice : cudaSuccess);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::strcpy(properties->name, "emulated");
  return result("cudaGetDeviceProperties");
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  const int architecture = device == 0 ? setting("architecture", 90) : 87;
  switch (which) {
    case cudaDevAttrMultiProcessorCount:
      *value = device == 0 ? 16 : 8;
      break;
    case cudaDevAttrIntegrated:
      *value = device == 0 ? 0 : 1;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = architecture / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = architecture % 10;
      break;
  }
  return result("cudaDeviceGetAttribute");
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return result("cudaSetDevice", cudaErrorInvalidDevice);
  make_current(device);
  return result("cudaSetDevice");
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  working_device();
  *free_bytes = *total_bytes = size_t{8} << 30;
  return result("cudaMemGetInfo");
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  working_device();
  if (reinterpret_cast<uintptr_t>(stream) == 666) return result("cudaMemcpyAsync", cudaErrorInvalidResourceHandle);
  const cudaError_t status = result("cudaMemcpyAsync");
  if (status == cudaSuccess) std::memcpy(to, from, bytes);
  return status;
}

cudaError_t cudaHostRegister(void* host, size_t bytes, unsigned) {
  const int device = working_device();
  const cudaError_t status = result("cudaHostRegister");
  if (status != cudaSuccess) return status;
  std::lock_guard<std::mutex> lock(mutex);
  const bool added = pinned().emplace(static_cast<const char*>(host), Range{bytes, device}).second;
  return added ? cudaSuccess : result("cudaHostRegister", cudaErrorHostMemoryAlreadyRegistered);
}

// Only in the context that it was registered in.
cudaError_t cudaHostUnregister(void* host) {
  const int device = working_device();
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = pinned().find(static_cast<const char*>(host));
  if (found == pinned().end() || found->second.device != device) {
    return result("cudaHostUnregister", cudaErrorHostMemoryNotRegistered);
  }
  pinned().erase(found);
  return result("cudaHostUnregister");
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  working_device();
  std::lock_guard<std::mutex> lock(mutex);
  const auto* byte = static_cast<const char*>(host);
  auto after = pinned().upper_bound(byte);
  if (after == pinned().begin() || byte >= (--after)->first + after->second.bytes) {
    return result("cudaHostGetDevicePointer", cudaErrorInvalidValue);
  }
  *device = host;
  return result("cudaHostGetDevicePointer");
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool get = std::strcmp(name, "cuCtxGetCurrent") == 0;
  *function = get ? reinterpret_cast<void*>(&get_context) : reinterpret_cast<void*>(&set_context);
  *found = cudaDriverEntryPointSuccess;
  return result("cudaGetDriverEntryPointByVersion");
}

// For the tests: what the driver knows.
extern "C" __attribute__((visibility("default"))) int fake_cuda_has_context(int device) { return has_context[device]; }
extern "C" __attribute__((visibility("default"))) int fake_cuda_current_context() { return static_cast<int>(context); }
extern "C" __attribute__((visibility("default"))) int fake_cuda_num_pinned() {
  return static_cast<int>(pinned().size());
}

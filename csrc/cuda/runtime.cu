#include "cuda/runtime.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/crossover.h"
#include "cuda/library_product.h"

namespace chainfed::cuda {

void check(cudaError_t status, const char* what);  // launch.h declares it to nvcc alone

namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string driver_remedy() {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return "no CUDA driver is loaded; install NVIDIA's driver (on a Jetson it comes with JetPack)";
  return "the driver serves CUDA " + version_text(driver) + ", this build needs " + version_text(runtime) +
         "; update the driver (JetPack), or rebuild with that CUDA toolkit's nvcc";
}

// The driver's current context of a thread, which torch's copy of the runtime and this one share.
struct Contexts {
  int (*get)(void** context) = nullptr;  // cuCtxGetCurrent
  int (*set)(void* context) = nullptr;   // cuCtxSetCurrent
};

template <typename Function>
void find_in_driver(const char* name, Function& function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(name, &found, 4000, cudaEnableDefault, &result), "a function of the driver");
#else
  check(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result), "a function of the driver");
#endif
  if (found == nullptr || result != cudaDriverEntryPointSuccess) {
    throw UnsupportedHardware("CUDA: the driver has no " + std::string(name) + "; " + driver_remedy());
  }
  function = reinterpret_cast<Function>(found);
}

const Contexts& contexts() {
  static const Contexts found = [] {
    Contexts functions;
    find_in_driver("cuCtxGetCurrent", functions.get);
    find_in_driver("cuCtxSetCurrent", functions.set);
    return functions;
  }();
  return found;
}

int attribute(int device, cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "a device attribute");
  return value;
}

int architecture_of(int device) {
  return attribute(device, cudaDevAttrComputeCapabilityMajor) * 10 +
         attribute(device, cudaDevAttrComputeCapabilityMinor);
}

int64_t default_library_from_tokens(int architecture) {
  if (const char* text = std::getenv("CHAINFED_CUDA_LIBRARY_FROM")) {
    const long long tokens = std::atoll(text);
    if (tokens < 1) throw InvalidArgument("CHAINFED_CUDA_LIBRARY_FROM must be a number of tokens, at least 1");
    return tokens;
  }
  return crossover_of(architecture);
}

std::unique_ptr<Device> open_device(int index) {
  const int architecture = architecture_of(index);
  if (architecture < 80) {
    throw UnsupportedHardware("cuda:" + std::to_string(index) + " is of architecture sm_" +
                              std::to_string(architecture) + "; the kernels need sm_80 (Ampere) or newer");
  }
  if (!runs_on(built_architectures(), architecture)) {
    throw UnsupportedHardware("cuda:" + std::to_string(index) + " is of architecture sm_" +
                              std::to_string(architecture) + ", this build has code for " + built_architectures() +
                              "; rebuild with CHAINFED_CUDA_ARCHITECTURES=" + std::to_string(architecture));
  }
  auto opened = std::make_unique<Device>();
  opened->index = index;
  opened->num_processors = attribute(index, cudaDevAttrMultiProcessorCount);
  const CurrentDevice current(index);
  opened->library = open_library();
  if (opened->library != nullptr) opened->library_from_tokens = default_library_from_tokens(architecture);
  return opened;
}

}  // namespace

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report it again
  const std::string text = "CUDA: " + std::string(what) + ": " + cudaGetErrorString(status);
  switch (status) {
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
    case cudaErrorInitializationError:
    case cudaErrorStubLibrary:
    case cudaErrorSystemNotReady:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
      throw UnsupportedHardware(text + "; " + driver_remedy());
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
      throw UnsupportedHardware(text + "; this build has code for " + built_architectures() +
                                ", rebuild with CHAINFED_CUDA_ARCHITECTURES set to the device's");
    case cudaErrorMemoryAllocation:
      throw OutOfMemory(text + "; set a smaller [memory] budget, so that fewer slots are held");
    case cudaErrorInvalidDevice:
    case cudaErrorInvalidValue:
      throw InvalidArgument(text);
    case cudaErrorInvalidResourceHandle:
      throw InvalidArgument(text + "; the stream must be one of the arrays' device");
    default:
      throw Error(text + "; an earlier kernel may be the cause (CUDA_LAUNCH_BLOCKING=1 names it)");
  }
}

const char* built_architectures() { return CHAINFED_CUDA_ARCHITECTURES; }

int num_devices() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorNoDevice) {
    cudaGetLastError();
    return 0;
  }
  check(status, "the number of devices");
  return count;
}

Device& device(int index) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<Device>> devices;
  std::lock_guard<std::mutex> lock(mutex);
  if (devices.empty()) devices.resize(static_cast<size_t>(std::max(num_devices(), 0)));
  if (index < 0 || index >= static_cast<int>(devices.size())) {
    throw InvalidArgument("cuda:" + std::to_string(index) + " is no device of this machine, which has " +
                          std::to_string(devices.size()));
  }
  auto& slot = devices[static_cast<size_t>(index)];
  if (slot == nullptr) slot = open_device(index);
  return *slot;
}

DeviceInfo device_info(int index) {
  const Device& opened = device(index);
  const CurrentDevice current(index);
  DeviceInfo info{};
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index), "device properties");
  std::copy_n(properties.name, std::min(sizeof info.name, sizeof properties.name) - 1, info.name);
  info.name[sizeof info.name - 1] = '\0';
  info.architecture = architecture_of(index);
  info.num_processors = opened.num_processors;
  info.is_unified = attribute(index, cudaDevAttrIntegrated);
  info.has_library = opened.library != nullptr;
  info.library_from_tokens = opened.library_from_tokens;
  size_t free_bytes = 0, total_bytes = 0;
  check(cudaMemGetInfo(&free_bytes, &total_bytes), "memory of the device");
  info.free_bytes = static_cast<int64_t>(free_bytes);
  info.total_bytes = static_cast<int64_t>(total_bytes);
  check(cudaDriverGetVersion(&info.driver_version), "the driver's version");
  check(cudaRuntimeGetVersion(&info.runtime_version), "the runtime's version");
  return info;
}

// Not by cudaGetDevice and cudaSetDevice back: since CUDA 12 the latter makes a context, hundreds of MiB, on a device
// that this thread never used.
CurrentDevice::CurrentDevice(int index) : previous_(nullptr) {
  contexts().get(&previous_);
  check(cudaSetDevice(index), "choosing a device");
}

CurrentDevice::~CurrentDevice() { contexts().set(previous_); }

void copy_to_device(Stream stream, void* to, const void* from_host, int64_t bytes) {
  check(cudaMemcpyAsync(to, from_host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                        static_cast<cudaStream_t>(stream)),
        "a copy to the device");
}

void pin(void* host, int64_t bytes) {
  check(cudaHostRegister(host, static_cast<size_t>(bytes), cudaHostRegisterMapped), "pinning host memory");
}

void unpin(void* host) { check(cudaHostUnregister(host), "unpinning host memory"); }

const void* device_pointer(const void* host) {
  void* pointer = nullptr;
  check(cudaHostGetDevicePointer(&pointer, const_cast<void*>(host), 0),
        "the device's address of memory that must be pinned");
  return pointer;
}

}  // namespace chainfed::cuda

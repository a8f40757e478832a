// Devices and memory, by the CUDA runtime; the emulated build has one of its own (tests/csrc/fake_cuda). All may throw
// chainfed errors.
#pragma once
#include <cstdint>

#include "chainfed/error.h"
#include "cuda/linear.h"
#include "cuda/table.h"

namespace chainfed::cuda {

int num_devices();
// What kernels need to know of a device; the same object for the life of the process. Throws InvalidArgument for a
// number that is no device, UnsupportedHardware for an architecture that this build has no code for.
Device& device(int index);
DeviceInfo device_info(int index);
const char* built_architectures();

// Makes a device the calling thread's current one for the length of a call, and leaves the thread's context as it was.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;

 private:
  void* previous_;
};

void copy_to_device(Stream stream, void* to, const void* from_host, int64_t bytes);
void pin(void* host, int64_t bytes);
void unpin(void* host);
const void* device_pointer(const void* host);

// Whether code built for `architectures` ("80,87,89,90") runs on a device of this architecture: the same major version
// and a minor one not above the device's; the newest is also built as portable code for devices newer than all.
bool runs_on(const char* architectures, int architecture);

}  // namespace chainfed::cuda

// Two devices for the tests: cuda:0 with memory of its own, cuda:1 that shares the CPU's. Device memory is host memory,
// a stream is any number, and a copy is done at once.
#include <cstring>
#include <map>
#include <string>

#include "cuda/library_product.h"
#include "cuda/runtime.h"

namespace chainfed::cuda {
namespace {

std::map<const char*, int64_t>& pinned() {
  static std::map<const char*, int64_t> ranges;
  return ranges;
}

}  // namespace

int num_devices() { return 2; }

Device& device(int index) {
  static Device devices[2] = {{0, 16, INT64_MAX, open_library()}, {1, 8, INT64_MAX, nullptr}};
  if (index < 0 || index > 1) {
    throw InvalidArgument("cuda:" + std::to_string(index) + " is no device of this machine, which has 2");
  }
  return devices[index];
}

DeviceInfo device_info(int index) {
  const Device& opened = device(index);
  DeviceInfo info{};
  std::strcpy(info.name, "emulated");
  info.architecture = index == 0 ? 90 : 87;
  info.num_processors = opened.num_processors;
  info.is_unified = index;
  info.has_library = opened.library != nullptr;
  info.library_from_tokens = opened.library_from_tokens;
  info.total_bytes = info.free_bytes = int64_t{8} << 30;
  info.driver_version = info.runtime_version = 13000;
  return info;
}

const char* built_architectures() { return "80,87,89,90"; }

CurrentDevice::CurrentDevice(int) : previous_(-1) {}
CurrentDevice::~CurrentDevice() = default;

void copy_to_device(Stream, void* to, const void* from_host, int64_t bytes) {
  std::memcpy(to, from_host, static_cast<size_t>(bytes));
}

void pin(void* host, int64_t bytes) {
  if (!pinned().emplace(static_cast<const char*>(host), bytes).second) throw InvalidArgument("pinned already");
}

void unpin(void* host) {
  if (pinned().erase(static_cast<const char*>(host)) == 0) throw InvalidArgument("not pinned");
}

const void* device_pointer(const void* host) {
  const auto* byte = static_cast<const char*>(host);
  auto after = pinned().upper_bound(byte);
  if (after == pinned().begin() || byte >= (--after)->first + after->second) throw InvalidArgument("not pinned");
  return host;
}

}  // namespace chainfed::cuda

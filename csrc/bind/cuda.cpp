#include "bind/cuda.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <mutex>

#include "bind/functions.h"
#include "chainfed/error.h"

namespace chainfed::bind {
namespace {

constexpr const char* kLibraryName = "libchainfed_cuda.so";

struct State {
  std::mutex mutex;
  std::string path;  // empty: beside this module
  const cuda::Table* table = nullptr;
};

State& state() {
  static State the_state;
  return the_state;
}

std::string default_path() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&default_path), &info) == 0 || info.dli_fname == nullptr) return kLibraryName;
  const std::string module = info.dli_fname;
  return module.substr(0, module.rfind('/') + 1) + kLibraryName;
}

const cuda::Table* open_table(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    throw UnsupportedHardware("CUDA is not part of this build (" + std::string(reason == nullptr ? path : reason) +
                              "); rebuild where nvcc is installed with CHAINFED_CUDA=1, or use the CPU");
  }
  using Entry = const cuda::Table* (*)();
  const auto entry = reinterpret_cast<Entry>(dlsym(library, "chainfed_cuda_table"));
  const cuda::Table* table = entry == nullptr ? nullptr : entry();
  if (table == nullptr || table->version != cuda::kTableVersion || table->table_bytes != sizeof(cuda::Table)) {
    throw UnsupportedHardware(path + " belongs to another version of the core; build both again");
  }
  return table;
}

void set_library(const std::optional<std::string>& path) {
  std::lock_guard<std::mutex> lock(state().mutex);
  state().path = path.value_or("");
  state().table = nullptr;
}

bool is_built() {
  std::lock_guard<std::mutex> lock(state().mutex);
  void* library = dlopen((state().path.empty() ? default_path() : state().path).c_str(), RTLD_LAZY | RTLD_LOCAL);
  if (library != nullptr) dlclose(library);
  return library != nullptr;
}

py::dict describe(int index) {
  cuda::DeviceInfo info{};
  call_cuda("cuda_device",
            [&](const cuda::Table& table, cuda::Message* message) { return table.device_info(index, &info, message); });
  py::dict result;
  result["name"] = std::string(info.name);
  result["architecture"] = info.architecture;
  result["num_processors"] = info.num_processors;
  result["is_unified"] = info.is_unified != 0;
  result["total_bytes"] = info.total_bytes;
  result["free_bytes"] = info.free_bytes;
  result["has_library"] = info.has_library != 0;
  result["library_from_tokens"] =
      info.library_from_tokens == INT64_MAX ? py::object(py::none()) : py::object(py::int_(info.library_from_tokens));
  result["driver_version"] = info.driver_version;
  result["runtime_version"] = info.runtime_version;
  return result;
}

int count_devices() {
  int32_t count = 0;
  call_cuda("num_cuda_devices",
            [&](const cuda::Table& table, cuda::Message* message) { return table.num_devices(&count, message); });
  return count;
}

void set_crossover(int device, const std::optional<int64_t>& tokens) {
  call_cuda("set_library_from_tokens", [&](const cuda::Table& table, cuda::Message* message) {
    return table.set_library_from_tokens(device, tokens.value_or(INT64_MAX), message);
  });
}

}  // namespace

const cuda::Table& cuda_table() {
  std::lock_guard<std::mutex> lock(state().mutex);
  if (state().table == nullptr) state().table = open_table(state().path.empty() ? default_path() : state().path);
  return *state().table;
}

void check_cuda(const char* function, cuda::Status status, const cuda::Message& message) {
  if (status == cuda::Status::ok) return;
  const std::string text = std::string(function) + ": " + message.text;
  switch (status) {
    case cuda::Status::invalid_argument:
      throw InvalidArgument(text);
    case cuda::Status::unsupported_hardware:
      throw UnsupportedHardware(text);
    case cuda::Status::out_of_memory:
      throw OutOfMemory(text);
    default:
      throw Error(text);
  }
}

int place_of_device(const char* function, const std::optional<int>& device) {
  if (!device) return kOnCpu;
  if (*device < 0)
    throw InvalidArgument(std::string(function) + ": device must be None or the number of a CUDA device");
  return *device;
}

void bind_cuda(py::module_& module) {
  module.def("cuda_is_built", &is_built);
  module.def("cuda_architectures", [] { return std::string(cuda_table().architectures); });
  module.def("num_cuda_devices", &count_devices);
  module.def("cuda_device", &describe, py::arg("device"));
  module.def("set_library_from_tokens", &set_crossover, py::arg("device"), py::arg("tokens").none(true));
  module.def("set_cuda_library", &set_library, py::arg("path").none(true));
}

}  // namespace chainfed::bind

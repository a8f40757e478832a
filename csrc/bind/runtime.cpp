// Build facts, SIMD level, threads, heap.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __GLIBC__
#include <malloc.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstddef>
#include <fstream>
#include <optional>
#include <string>
#include <vector>

#include "base/simd_level.h"
#include "base/thread_pool.h"
#include "bind/functions.h"

namespace chainfed::bind {
namespace {

namespace py = pybind11;

py::dict build_info() {
  py::dict info;
  info["version"] = CHAINFED_VERSION;
  info["compiler"] = std::string(
#ifdef __clang__
      "clang "
#else
      "gcc "
#endif
      __VERSION__);
  info["simd"] = simd_level_names();
  return info;
}

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(supported_simd_level()); ++i) {
    names.emplace_back(simd_level_name(static_cast<SimdLevel>(i)));
  }
  return names;
}

std::string set_level(const std::optional<std::string>& level) {
  if (level) {
    set_simd_level(parse_simd_level(level->c_str()));
  } else {
    reset_simd_level();
  }
  return simd_level_name(simd_level());
}

#ifdef __GLIBC__
/** Resident memory that no file backs; 0 where the kernel does not tell. */
std::size_t anonymous_bytes() {
  std::size_t pages[3] = {};
  std::ifstream statm("/proc/self/statm");
  if (!(statm >> pages[0] >> pages[1] >> pages[2])) return 0;
  return (pages[1] - pages[2]) * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}
#endif

/** With `above_bytes`: only once that much more is resident than after the last time. What malloc counts as free would
 *  not do: pages that were given back stay in its count. */
void trim_heap(std::size_t above_bytes) {
#ifdef __GLIBC__
  static std::atomic<std::size_t> least{0};
  if (above_bytes > 0) {
    const std::size_t now = anonymous_bytes();
    if (now < least) least = now;
    if (now > 0 && now <= least + above_bytes) return;
  }
  malloc_trim(0);
  least = anonymous_bytes();
#endif
}

}  // namespace

void bind_runtime(py::module_& module) {
  module.def("build_info", &build_info);
  module.def("simd_levels", &simd_levels);
  module.def("simd_level", [] { return std::string(simd_level_name(simd_level())); });
  module.def("set_simd_level", &set_level, py::arg("level").none(true));
  module.def("num_threads", &num_threads);
  module.def("set_num_threads", &set_num_threads, py::arg("count"));
  module.def("trim_heap", &trim_heap, py::arg("above_bytes") = 0, py::call_guard<py::gil_scoped_release>());
}

}  // namespace chainfed::bind

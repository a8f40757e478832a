// Build facts, SIMD level, threads, heap.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <cstddef>
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

void trim_heap(std::size_t above_bytes) {
#ifdef __GLIBC__
#if __GLIBC_PREREQ(2, 33)
  if (above_bytes > 0 && mallinfo2().fordblks <= above_bytes) return;
#endif
  malloc_trim(0);
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

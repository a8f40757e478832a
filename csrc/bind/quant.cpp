// Matrix, sizes, quantise, decode and look up.
#include <pybind11/pybind11.h>

#include <string>

#include "bind/array.h"
#include "bind/functions.h"
#include "bind/matrix.h"
#include "chainfed/kernels.h"

namespace chainfed::bind {
namespace {

void bind_matrix(py::module_& module) {
  py::class_<Matrix>(module, "Matrix")
      .def_static("from_arrays", &Matrix::from_arrays, py::arg("codes"), py::arg("scales").none(true), py::kw_only(),
                  py::arg("block_format"), py::arg("num_rows"), py::arg("num_cols"))
      .def_property_readonly("num_rows", &Matrix::num_rows)
      .def_property_readonly("num_cols", &Matrix::num_cols)
      .def_property_readonly("block_format", [](const Matrix& m) { return block_format_name(m.format()); });
}

}  // namespace

void bind_quant(py::module_& module) {
  bind_matrix(module);
  module.def(
      "codes_bytes",
      [](const std::string& block_format, int64_t num_rows, int64_t num_cols) {
        return codes_bytes(parse_block_format(block_format.c_str()), num_rows, num_cols);
      },
      py::arg("block_format"), py::arg("num_rows"), py::arg("num_cols"));
  module.def(
      "scales_bytes",
      [](const std::string& block_format, int64_t num_rows, int64_t num_cols) {
        return scales_bytes(parse_block_format(block_format.c_str()), num_rows, num_cols);
      },
      py::arg("block_format"), py::arg("num_rows"), py::arg("num_cols"));
}

}  // namespace chainfed::bind

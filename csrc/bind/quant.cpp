// Matrix, sizes, quantise, decode and look up.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bind/array.h"
#include "bind/functions.h"
#include "bind/matrix.h"
#include "chainfed/kernels.h"
#include "quant/nf4_table.h"

namespace chainfed::bind {
namespace {

void bind_matrix(py::module_& module) {
  py::class_<Matrix>(module, "Matrix")
      .def_static("from_arrays", &Matrix::from_arrays, py::arg("codes"), py::arg("scales").none(true), py::kw_only(),
                  py::arg("block_format"), py::arg("num_rows"), py::arg("num_cols"))
      .def_property_readonly("num_rows", &Matrix::num_rows)
      .def_property_readonly("num_cols", &Matrix::num_cols)
      .def_property_readonly("device",
                             [](const Matrix& m) { return m.place() == kOnCpu ? "cpu" : place_name(m.place()); })
      .def_property_readonly("block_format", [](const Matrix& m) { return block_format_name(m.format()); });
}

void quantize(py::handle weight_object, const std::string& block_format, py::handle codes_object,
              py::handle scales_object) {
  Arguments args("quantize_blocks");
  const BlockFormat format = parse_block_format(block_format.c_str());
  const Array& weight = args.input("weight", weight_object, Dtype::f32, {kAny, kAny});
  const Storage storage = storage_of(format, weight.size(0), weight.size(1));
  const Array& codes = args.storage("codes_out", codes_object, storage.codes_dtype, storage.codes_count, 1, true);
  void* scales = nullptr;
  if (storage.scales_count != 0) {
    scales =
        args.storage("scales_out", scales_object, storage.scales_dtype, storage.scales_count, 1, true).mutable_data();
  } else if (!scales_object.is_none()) {
    args.fail("scales_out must be None for " + block_format);
  }
  args.check_aliases();
  py::gil_scoped_release nogil;
  quantize_blocks(weight.as<float>(), weight.size(0), weight.size(1), format, codes.mutable_data(), scales);
}

void dequantize(const Matrix& matrix, int64_t row_begin, int64_t row_end, py::handle out_object) {
  Arguments args("dequantize_rows");
  const MatrixView& w = matrix.view(args);
  if (row_begin < 0 || row_begin > row_end || row_end > w.num_rows) {
    args.fail("row_begin and row_end must keep 0 <= row_begin <= row_end <= " + std::to_string(w.num_rows) + ", got " +
              std::to_string(row_begin) + " and " + std::to_string(row_end));
  }
  const Array& out = args.output("out", out_object, Dtype::f32, {row_end - row_begin, w.num_cols});
  args.check_aliases();
  py::gil_scoped_release nogil;
  dequantize_rows(w, row_begin, row_end, out.mutable_as<float>());
}

void gather(const Matrix& matrix, py::handle ids_object, py::handle out_object) {
  Arguments args("gather_rows");
  const MatrixView& w = matrix.view(args);
  const Array& ids = args.input("row_ids", ids_object, Dtype::i64, {kAny});
  const Array& out = args.output("out", out_object, Dtype::f32, {ids.size(0), w.num_cols});
  args.check_aliases();
  args.check_indices("row_ids", ids, w.num_rows);
  py::gil_scoped_release nogil;
  gather_rows(w, ids.as<int64_t>(), ids.size(0), out.mutable_as<float>());
}

// GGUF blocks u8 [N, K / 32 * block_bytes] to tiles of `format`.
template <typename Repack>
void repack(const char* function, BlockFormat format, int64_t block_bytes, Repack kernel, py::handle blocks_object,
            int64_t num_rows, int64_t num_cols, py::handle codes_object, py::handle scales_object) {
  Arguments args(function);
  if (num_rows < 1 || num_cols < 1 || num_cols % kTileCols != 0) {
    args.fail("num_rows must be >= 1 and num_cols a positive multiple of 32, got " + std::to_string(num_rows) +
              " and " + std::to_string(num_cols));
  }
  const Storage storage = storage_of(format, num_rows, num_cols);
  const Array& blocks = args.input("blocks", blocks_object, Dtype::u8, {num_rows, num_cols / kTileCols * block_bytes});
  const Array& codes = args.storage("codes_out", codes_object, storage.codes_dtype, storage.codes_count, 1, true);
  const Array& scales = args.storage("scales_out", scales_object, storage.scales_dtype, storage.scales_count, 1, true);
  args.check_aliases();
  py::gil_scoped_release nogil;
  kernel(blocks.as<uint8_t>(), num_rows, num_cols, codes.mutable_data(), scales.mutable_as<uint16_t>());
}

void repack_int4(py::handle blocks, int64_t num_rows, int64_t num_cols, py::handle codes, py::handle scales) {
  const auto kernel = [](const uint8_t* in, int64_t rows, int64_t cols, void* out, uint16_t* out_scales) {
    repack_q4_1(in, rows, cols, static_cast<uint8_t*>(out), out_scales);
  };
  repack("repack_q4_1", BlockFormat::int4, kQ41BlockBytes, kernel, blocks, num_rows, num_cols, codes, scales);
}

void repack_int8(py::handle blocks, int64_t num_rows, int64_t num_cols, py::handle codes, py::handle scales) {
  const auto kernel = [](const uint8_t* in, int64_t rows, int64_t cols, void* out, uint16_t* out_scales) {
    repack_q8_0(in, rows, cols, static_cast<int8_t*>(out), out_scales);
  };
  repack("repack_q8_0", BlockFormat::int8, kQ80BlockBytes, kernel, blocks, num_rows, num_cols, codes, scales);
}

std::vector<float> nf4_table() { return {kNf4Table, kNf4Table + 16}; }

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
  module.def("quantize_blocks", &quantize, py::arg("weight"), py::kw_only(), py::arg("block_format"),
             py::arg("codes_out"), py::arg("scales_out").none(true));
  module.def("dequantize_rows", &dequantize, py::arg("matrix"), py::arg("row_begin"), py::arg("row_end"), py::kw_only(),
             py::arg("out"));
  module.def("gather_rows", &gather, py::arg("matrix"), py::arg("row_ids"), py::kw_only(), py::arg("out"));
  module.def("repack_q4_1", &repack_int4, py::arg("blocks"), py::kw_only(), py::arg("num_rows"), py::arg("num_cols"),
             py::arg("codes_out"), py::arg("scales_out"));
  module.def("repack_q8_0", &repack_int8, py::arg("blocks"), py::kw_only(), py::arg("num_rows"), py::arg("num_cols"),
             py::arg("codes_out"), py::arg("scales_out"));
  module.def("nf4_table", &nf4_table);
}

}  // namespace chainfed::bind

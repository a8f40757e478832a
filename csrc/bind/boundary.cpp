// The boundary codec: f32 rows to packed records and back.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "bind/array.h"
#include "bind/cuda.h"
#include "bind/functions.h"
#include "boundary/adapter.h"
#include "chainfed/error.h"
#include "chainfed/kernels.h"

namespace chainfed::bind {
namespace {

CacheFormat parse_cache_format(const char* function, const std::string& name) {
  if (name == "int8") return CacheFormat::int8;
  if (name == "bf16") return CacheFormat::bf16;
  if (name == "f32") return CacheFormat::f32;
  throw InvalidArgument(std::string(function) + ": cache_format must be int8, bf16 or f32, got " + name);
}

BottleneckView read_adapter(Arguments& args, py::handle object, int64_t hidden_size) {
  if (!py::isinstance<py::tuple>(object) || py::len(object) != 4) {
    args.fail("adapter must be None or a tuple of down_weight, down_bias, up_weight, up_bias");
  }
  const auto arrays = py::reinterpret_borrow<py::tuple>(object);
  const Array& down_weight = args.input("adapter down_weight", arrays[0], Dtype::f32, {kAny, hidden_size});
  const int64_t width = down_weight.size(0);
  const Array& down_bias = args.input("adapter down_bias", arrays[1], Dtype::f32, {width});
  const Array& up_weight = args.input("adapter up_weight", arrays[2], Dtype::f32, {hidden_size, width});
  const Array& up_bias = args.input("adapter up_bias", arrays[3], Dtype::f32, {hidden_size});
  if (width < 1 || width > kMaxAdapterWidth || hidden_size > kMaxAdapterHiddenSize) {
    args.fail("adapter must have a width of 1.." + std::to_string(kMaxAdapterWidth) + " and a hidden size of at most " +
              std::to_string(kMaxAdapterHiddenSize) + ", got " + std::to_string(width) + " and " +
              std::to_string(hidden_size));
  }
  return {width, down_weight.as<float>(), down_bias.as<float>(), up_weight.as<float>(), up_bias.as<float>()};
}

void encode(py::handle hidden_object, py::handle adapter_object, const std::string& cache_format, py::handle out_object,
            uintptr_t stream_handle) {
  Arguments args("boundary_encode", Arguments::Devices::any);
  const CacheFormat format = parse_cache_format(args.function(), cache_format);
  const Array& hidden = args.input("hidden", hidden_object, Dtype::f32, {kAny, kAny});
  const int64_t num_tokens = hidden.size(0), hidden_size = hidden.size(1);
  BottleneckView adapter{};
  const bool has_adapter = !adapter_object.is_none();
  if (has_adapter) adapter = read_adapter(args, adapter_object, hidden_size);
  const Array& out = args.output("out", out_object, Dtype::u8, {num_tokens, record_bytes(format, hidden_size)});
  void* stream = args.stream(stream_handle);
  args.check_aliases();
  py::gil_scoped_release nogil;
  if (args.on_cuda()) {
    const cuda::EncodeCall call{hidden.as<float>(),
                                num_tokens,
                                hidden_size,
                                adapter,
                                format,
                                out.mutable_as<uint8_t>(),
                                record_bytes(format, hidden_size)};
    call_cuda(args.function(), [&](const cuda::Table& table, cuda::Message* message) {
      return table.boundary_encode(args.place(), stream, &call, message);
    });
    return;
  }
  boundary_encode(hidden.as<float>(), num_tokens, hidden_size, has_adapter ? &adapter : nullptr, format,
                  out.mutable_as<uint8_t>());
}

// Two tokens on one row would be a race between threads.
void check_distinct(const Arguments& args, const Array& rows, int64_t num_rows) {
  if (args.on_cuda()) return;  // not read here; the rows named twice hold one of the two tokens
  std::vector<bool> taken(num_rows, false);
  for (int64_t t = 0; t < rows.size(0); ++t) {
    const int64_t row = rows.as<int64_t>()[t];
    if (taken[row]) args.fail("out_rows must be distinct, got " + std::to_string(row) + " twice");
    taken[row] = true;
  }
}

void decode(py::handle records_object, py::handle rows_object, const std::string& cache_format, py::handle out_object,
            uintptr_t stream_handle) {
  Arguments args("boundary_decode", Arguments::Devices::any);
  const CacheFormat format = parse_cache_format(args.function(), cache_format);
  const Array& out = args.output("out", out_object, Dtype::f32, {kAny, kAny});
  const int64_t hidden_size = out.size(1);
  const Array& records = args.input("records", records_object, Dtype::u8, {kAny, record_bytes(format, hidden_size)});
  const Array& rows = args.input("out_rows", rows_object, Dtype::i64, {records.size(0)});
  args.check_indices("out_rows", rows, out.size(0));
  check_distinct(args, rows, out.size(0));
  void* stream = args.stream(stream_handle);
  args.check_aliases();
  py::gil_scoped_release nogil;
  if (args.on_cuda()) {
    const cuda::DecodeCall call{
        records.as<uint8_t>(), records.size(0),         hidden_size, record_bytes(format, hidden_size), format,
        rows.as<int64_t>(),    out.mutable_as<float>(), out.size(0)};
    call_cuda(args.function(), [&](const cuda::Table& table, cuda::Message* message) {
      return table.boundary_decode(args.place(), stream, &call, message);
    });
    return;
  }
  boundary_decode(records.as<uint8_t>(), records.size(0), hidden_size, format, rows.as<int64_t>(),
                  out.mutable_as<float>());
}

}  // namespace

void bind_boundary(py::module_& module) {
  module.def(
      "record_bytes",
      [](const std::string& cache_format, int64_t hidden_size) {
        return record_bytes(parse_cache_format("record_bytes", cache_format), hidden_size);
      },
      py::arg("cache_format"), py::arg("hidden_size"));
  module.def("boundary_encode", &encode, py::arg("hidden"), py::kw_only(), py::arg("adapter").none(true),
             py::arg("cache_format"), py::arg("out"), py::arg("stream") = 0);
  module.def("boundary_decode", &decode, py::arg("records"), py::arg("out_rows"), py::kw_only(),
             py::arg("cache_format"), py::arg("out"), py::arg("stream") = 0,
             "Scatter decoded records to the rows of out. Rows that no record names keep their values: the caller "
             "zeroes the padding.");
}

}  // namespace chainfed::bind

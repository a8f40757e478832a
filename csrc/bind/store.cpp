// StoreReader and Lease for Python. The index arrives as tuples that a JSON file may have produced: every field is
// converted by hand so that a wrong type is an InvalidArgument that names it.
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "bind/array.h"
#include "bind/cuda.h"
#include "bind/functions.h"
#include "bind/matrix.h"
#include "chainfed/error.h"
#include "chainfed/store.h"
#include "store/page_buffer.h"

namespace chainfed::bind {
namespace {

// The object as Python prints it, shortened, in ASCII (an error message must be valid UTF-8).
std::string printed(const py::handle& object) {
  PyObject* text = PyObject_ASCII(object.ptr());
  if (text == nullptr) {
    PyErr_Clear();
    return "not printable";
  }
  return py::reinterpret_steal<py::str>(text).cast<std::string>().substr(0, 80);
}

template <typename T>
T convert(const py::handle& object, const std::string& what) {
  try {
    return object.cast<T>();
  } catch (const py::cast_error&) {
    throw InvalidArgument("StoreReader: " + what + " is " + printed(object) + ", expected " +
                          (std::is_same_v<T, int64_t> ? "a 64-bit integer" : "text"));
  }
}

py::sequence sequence_of(const py::handle& object, size_t length, const std::string& what) {
  if (!py::isinstance<py::tuple>(object) && !py::isinstance<py::list>(object)) {
    throw InvalidArgument("StoreReader: " + what + " must be a tuple or list");
  }
  auto result = py::reinterpret_borrow<py::sequence>(object);
  if (length != 0 && result.size() != length) {
    throw InvalidArgument("StoreReader: " + what + " has " + std::to_string(result.size()) + " fields, expected " +
                          std::to_string(length));
  }
  return result;
}

std::string path_of(const py::handle& object, const std::string& what) {
  PyObject* bytes = nullptr;
  if (PyUnicode_FSConverter(object.ptr(), &bytes) == 0) {
    PyErr_Clear();
    throw InvalidArgument("StoreReader: the path of " + what + " must be text or a path without a null character");
  }
  return py::reinterpret_steal<py::bytes>(bytes);
}

TensorEntry tensor_of(const py::handle& object, const std::string& file) {
  const py::sequence fields = sequence_of(object, 8, "a tensor of " + file);
  TensorEntry tensor;
  tensor.name = convert<std::string>(fields[0], "a tensor's name in " + file);
  const std::string what = " of '" + tensor.name + "' in " + file;
  tensor.format = parse_block_format(convert<std::string>(fields[1], "block_format" + what).c_str());
  tensor.num_rows = convert<int64_t>(fields[2], "num_rows" + what);
  tensor.num_cols = convert<int64_t>(fields[3], "num_cols" + what);
  tensor.codes_offset = convert<int64_t>(fields[4], "codes_offset" + what);
  tensor.codes_bytes = convert<int64_t>(fields[5], "codes_bytes" + what);
  tensor.scales_offset = convert<int64_t>(fields[6], "scales_offset" + what);
  tensor.scales_bytes = convert<int64_t>(fields[7], "scales_bytes" + what);
  return tensor;
}

std::vector<FileEntry> files_of(const py::handle& object) {
  std::vector<FileEntry> files;
  for (const py::handle& item : sequence_of(object, 0, "files")) {
    const py::sequence fields = sequence_of(item, 3, "files[" + std::to_string(files.size()) + "]");
    FileEntry entry;
    entry.path = path_of(fields[0], "files[" + std::to_string(files.size()) + "]");
    entry.file_bytes = convert<int64_t>(fields[1], "file_bytes of " + entry.path);
    for (const py::handle& tensor : sequence_of(fields[2], 0, "the tensors of " + entry.path)) {
      entry.tensors.push_back(tensor_of(tensor, entry.path));
    }
    files.push_back(std::move(entry));
  }
  return files;
}

// How a device has its slots held in place; null without one.
std::shared_ptr<const Pinning> pinning_for(const std::optional<int>& device) {
  const int place = place_of_device("StoreReader", device);
  if (place == kOnCpu) return nullptr;
  const cuda::Table* table = &cuda_table();  // a build without CUDA is known now, not at the first read
  auto pinning = std::make_shared<Pinning>();
  pinning->pin = [place, table](void* data, int64_t bytes) {
    cuda::Message message{};
    check_cuda("StoreReader", table->pin(place, data, bytes, &message), message);
  };
  pinning->unpin = [place, table](void* data) {
    cuda::Message message{};
    // At the end of a process the driver may be gone: nothing is left to unpin then.
    table->unpin(place, data, &message);
  };
  return pinning;
}

// The reader until close(). A call that runs in another thread during close() holds a reference and finishes.
class ClosableReader {
 public:
  ClosableReader(const py::object& files, int num_slots, bool direct, const std::optional<int>& pinned_for) {
    std::vector<FileEntry> entries = files_of(files);
    py::gil_scoped_release nogil;
    reader_ = std::make_shared<StoreReader>(std::move(entries), num_slots, direct, pinning_for(pinned_for));
  }
  std::shared_ptr<StoreReader> get() const {
    if (reader_ == nullptr) throw InvalidArgument("this StoreReader is closed; open a new one");
    return reader_;
  }
  void close() {
    std::shared_ptr<StoreReader> last = std::move(reader_);
    py::gil_scoped_release nogil;
    last.reset();
  }

  // The resident case neither waits nor gives up the GIL: about a microsecond.
  std::shared_ptr<Lease> acquire(int file) const {
    const std::shared_ptr<StoreReader> reader = get();
    std::shared_ptr<Lease> lease = reader->try_acquire(file);
    if (lease != nullptr) return lease;
    py::gil_scoped_release nogil;
    return reader->acquire(file);
  }

  void gather_rows(int file, const std::string& name, const py::object& row_ids, const py::object& out) const {
    const std::shared_ptr<StoreReader> reader = get();
    const int64_t num_cols = reader->tensor(file, name).num_cols;
    Arguments args("StoreReader.gather_rows");
    const Array& ids = args.input("row_ids", row_ids, Dtype::i64, {kAny});
    const Array& rows = args.output("out", out, Dtype::f32, {ids.size(0), num_cols});
    args.check_aliases();
    py::gil_scoped_release nogil;
    reader->gather_rows_from_disk(file, name, ids.as<int64_t>(), ids.size(0), rows.mutable_as<float>());
  }

  py::dict stats() const {
    const ReaderStats stats = get()->stats();
    py::dict result;
    result["bytes_read"] = stats.bytes_read;
    result["stall_ns"] = stats.stall_ns;
    result["read_ns"] = stats.read_ns;
    result["hits"] = stats.hits;
    result["misses"] = stats.misses;
    result["resident_bytes"] = stats.resident_bytes;
    return result;
  }

 private:
  std::shared_ptr<StoreReader> reader_;
};

// The tensor where it lies; for a device, by that device's address of the same pinned memory.
Matrix matrix_of_lease(const std::shared_ptr<Lease>& lease, const std::string& name, const std::optional<int>& device) {
  const int place = place_of_device("Lease.matrix", device);
  if (place == kOnCpu) return Matrix(lease, lease->matrix(name), [lease] { return lease->pin(); });
  const void* base = nullptr;
  call_cuda("Lease.matrix", [&](const cuda::Table& table, cuda::Message* message) {
    return table.device_pointer(place, lease->data(), &base, message);
  });
  return Matrix(lease, lease->matrix_in(name, base), [lease] { return lease->pin(); }, place);
}

// The tensor in `slot`, which holds (or will hold, on its stream) a copy of the file. It outlives the lease and is as
// valid as the slot's contents.
Matrix matrix_in_slot(const Lease& lease, const std::string& name, const py::object& slot_object) {
  Arguments args("Lease.matrix_in", Arguments::Devices::any);
  const Array& slot = args.input("slot", slot_object, Dtype::u8, {kAny}, 64);
  if (slot.size(0) < lease.file_bytes()) {
    args.fail("slot must be uint8 [>= " + std::to_string(lease.file_bytes()) + "], got " +
              std::to_string(slot.size(0)));
  }
  const MatrixView view = lease.matrix_in(name, slot.data());
  const int place = args.place();
  return Matrix(std::make_shared<Array>(args.take(slot)), view, {}, place);
}

// Starts copying the file's bytes to `slot` on the stream. The lease must be held until the copy is over.
void copy_to_slot(const Lease& lease, const py::object& slot_object, uintptr_t stream_handle) {
  Arguments args("Lease.copy_to", Arguments::Devices::any);
  const Array& slot = args.output("slot", slot_object, Dtype::u8, {kAny}, 64);
  if (!args.on_cuda()) args.fail("slot must be on a CUDA device, got an array on the CPU");
  if (slot.size(0) < lease.file_bytes()) {
    args.fail("slot must be uint8 [>= " + std::to_string(lease.file_bytes()) + "], got " +
              std::to_string(slot.size(0)));
  }
  void* stream = args.stream(stream_handle);
  const void* data = lease.data();
  py::gil_scoped_release nogil;
  call_cuda(args.function(), [&](const cuda::Table& table, cuda::Message* message) {
    return table.copy_to_device(args.place(), stream, slot.mutable_data(), data, lease.file_bytes(), message);
  });
}

}  // namespace

void bind_store(py::module_& module) {
  py::class_<Lease, std::shared_ptr<Lease>>(module, "Lease")
      .def("matrix", &matrix_of_lease, py::arg("name"), py::kw_only(), py::arg("device") = py::none())
      .def("matrix_in", &matrix_in_slot, py::arg("name"), py::arg("slot"))
      .def("copy_to", &copy_to_slot, py::arg("slot"), py::kw_only(), py::arg("stream"))
      .def_property_readonly("file_bytes", &Lease::file_bytes)
      .def("names", &Lease::names)
      .def("release", &Lease::release)
      .def("__enter__", [](const std::shared_ptr<Lease>& lease) { return lease; })
      .def("__exit__", [](Lease& lease, const py::args&) { lease.release(); });
  py::class_<ClosableReader>(module, "StoreReader")
      .def(py::init<const py::object&, int, bool, const std::optional<int>&>(), py::arg("files"), py::kw_only(),
           py::arg("num_slots"), py::arg("direct") = true, py::arg("pinned_for") = py::none())
      .def(
          "prefetch", [](const ClosableReader& self, int file) { self.get()->prefetch(file); }, py::arg("file"))
      .def("acquire", &ClosableReader::acquire, py::arg("file"))
      .def("gather_rows", &ClosableReader::gather_rows, py::arg("file"), py::arg("name"), py::arg("row_ids"),
           py::kw_only(), py::arg("out"))
      .def("stats", &ClosableReader::stats)
      .def("slot_bytes", [](const ClosableReader& self) { return self.get()->slot_bytes(); })
      .def_property_readonly("direct", [](const ClosableReader& self) { return self.get()->direct(); })
      .def("close", &ClosableReader::close);
}

}  // namespace chainfed::bind

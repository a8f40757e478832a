#include "bind/array.h"

#include <algorithm>
#include <string>
#include <utility>

#include "bind/dlpack.h"
#include "chainfed/error.h"

namespace chainfed::bind {
namespace {

constexpr struct {
  const char* name;
  int64_t bytes;
} kDtypes[] = {{"uint8", 1},    {"int8", 1},    {"int16", 2},   {"int32", 4}, {"int64", 8},        {"float16", 2},
               {"bfloat16", 2}, {"float32", 4}, {"float64", 8}, {"bool", 1},  {"another dtype", 1}};

Dtype dlpack_dtype(const DlpackTensor& tensor) {
  if (tensor.dtype.lanes != 1) return Dtype::other;
  const int key = tensor.dtype.code * 1000 + tensor.dtype.bits;
  switch (key) {
    case kDlpackUint * 1000 + 8:
      return Dtype::u8;
    case kDlpackInt * 1000 + 8:
      return Dtype::i8;
    case kDlpackInt * 1000 + 16:
      return Dtype::i16;
    case kDlpackInt * 1000 + 32:
      return Dtype::i32;
    case kDlpackInt * 1000 + 64:
      return Dtype::i64;
    case kDlpackFloat * 1000 + 16:
      return Dtype::f16;
    case kDlpackBfloat * 1000 + 16:
      return Dtype::bf16;
    case kDlpackFloat * 1000 + 32:
      return Dtype::f32;
    case kDlpackFloat * 1000 + 64:
      return Dtype::f64;
    case kDlpackBool * 1000 + 8:
      return Dtype::boolean;
    default:
      return Dtype::other;
  }
}

// PEP 3118 format characters of the native, single-element kind.
Dtype buffer_dtype(const char* format, int64_t item_bytes) {
  if (format == nullptr) return Dtype::u8;
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  if (format[0] == '\0' || format[1] != '\0') return Dtype::other;
  switch (*format) {
    case 'B':
      return Dtype::u8;
    case 'b':
      return Dtype::i8;
    case 'h':
      return Dtype::i16;
    case 'i':
      return Dtype::i32;
    case 'l':
    case 'q':
      return item_bytes == 8 ? Dtype::i64 : Dtype::i32;
    case 'e':
      return Dtype::f16;
    case 'f':
      return Dtype::f32;
    case 'd':
      return Dtype::f64;
    case '?':
      return Dtype::boolean;
    default:
      return Dtype::other;
  }
}

bool is_contiguous(const std::vector<int64_t>& shape, const int64_t* strides, int64_t unit) {
  if (strides == nullptr) return true;
  for (int64_t size : shape) {
    if (size == 0) return true;
  }
  int64_t expected = unit;
  for (size_t dim = shape.size(); dim-- > 0;) {
    if (shape[dim] != 1 && strides[dim] != expected) return false;
    expected *= shape[dim];
  }
  return true;
}

std::string describe(Dtype dtype, const std::vector<int64_t>& shape) {
  std::string text = std::string(dtype_name(dtype)) + " [";
  for (size_t dim = 0; dim < shape.size(); ++dim) {
    if (dim > 0) text += ", ";
    text += shape[dim] == kAny ? "any" : std::to_string(shape[dim]);
  }
  return text + "]";
}

std::string python_error_text(py::error_already_set& error) {
  const std::string text = error.what();
  return text.substr(0, text.find('\n'));
}

}  // namespace

// Fills an Array from an exporter. Needs the GIL.
class ArrayReader {
 public:
  // Returns false when the object speaks neither protocol; throws py::error_already_set when its export fails.
  static bool read(py::handle object, Array& array) {
    if (read_through_table(object, array)) return true;
    const bool has_buffer = PyObject_CheckBuffer(object.ptr()) != 0;
    if (py::hasattr(object, "__dlpack__")) {
      try {
        read_dlpack(object, array);
        return true;
      } catch (py::error_already_set& error) {
        // DLPack before 1.0 cannot say "read-only" (NumPy 1.26); the buffer protocol can.
        if (!has_buffer || !error.matches(PyExc_BufferError)) throw;
      }
    }
    if (has_buffer) {
      read_buffer(object, array);
      return true;
    }
    return false;
  }

 private:
  // A CUDA array is exported without waiting for its stream (-1): the call runs on the caller's.
  static py::object export_capsule(py::handle object, bool is_cuda) {
    const py::object method = object.attr("__dlpack__");
    py::dict arguments;
    if (is_cuda) arguments["stream"] = -1;
    py::dict versioned = py::reinterpret_steal<py::dict>(PyDict_Copy(arguments.ptr()));
    versioned["max_version"] = py::make_tuple(kDlpackMajor, 0);
    try {
      return method(**versioned);
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) throw;  // a TypeError: an exporter from before max_version
    }
    return method(**arguments);
  }

  static int place_of(int32_t type, int32_t id) {
    if (type == kDlpackCpu || type == kDlpackCudaHost) return kOnCpu;
    return type == kDlpackCuda && id >= 0 ? id : kElsewhere;
  }

  // For objects of the very class that offers the table: a subclass may export in its own way, and methods word errors
  // better. The table knows no refusal of arrays that take part in a gradient. Nor does it wait for a stream.
  static bool read_through_table(py::handle object, Array& array) {
    static PyObject* const attribute = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
    static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
    PyObject* dict = Py_TYPE(object.ptr())->tp_dict;
    PyObject* capsule = dict == nullptr ? nullptr : PyDict_GetItemWithError(dict, attribute);
    if (capsule == nullptr || PyCapsule_IsValid(capsule, "dlpack_exchange_api") == 0) return false;
    const auto* table = static_cast<const DlpackExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (table->version.major != kDlpackMajor || table->export_managed == nullptr) return false;
    const auto needs_grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), requires_grad));
    DlpackManagedVersioned* managed = nullptr;
    if (needs_grad.ptr() != Py_False || table->export_managed(object.ptr(), &managed) != 0) {
      PyErr_Clear();
      return false;
    }
    consume(managed, array);
    array.read_only_ = (managed->flags & kDlpackReadOnly) != 0;
    return true;
  }

  static void read_dlpack(py::handle object, Array& array) {
    if (py::hasattr(object, "__dlpack_device__")) {
      const py::tuple device = object.attr("__dlpack_device__")();
      array.place_ = place_of(py::cast<int>(py::int_(device[0])), py::cast<int>(py::int_(device[1])));
      if (array.place_ == kElsewhere) {
        array.null_ = false;
        return;
      }
    }
    const py::object capsule = export_capsule(object, array.place_ >= 0);
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
      auto* managed = static_cast<DlpackManagedVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
      if (managed->version.major != kDlpackMajor) throw py::buffer_error("a DLPack version other than 1");
      take_over(capsule, "used_dltensor_versioned");
      consume(managed, array);
      array.read_only_ = (managed->flags & kDlpackReadOnly) != 0;
    } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
      auto* managed = static_cast<DlpackManaged*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
      take_over(capsule, "used_dltensor");
      consume(managed, array);
    } else {
      throw py::buffer_error("__dlpack__ gave no DLPack capsule");
    }
  }

  static void take_over(const py::object& capsule, const char* used_name) {
    PyCapsule_SetName(capsule.ptr(), used_name);
    PyCapsule_SetDestructor(capsule.ptr(), nullptr);
  }

  template <typename Managed>
  static void consume(Managed* managed, Array& array) {
    array.keep_alive_ = std::shared_ptr<void>(managed, [](void* pointer) {
      auto* owned = static_cast<Managed*>(pointer);
      if (owned->deleter != nullptr) owned->deleter(owned);
    });
    const DlpackTensor& tensor = managed->tensor;
    array.shape_.assign(tensor.shape, tensor.shape + tensor.num_dims);
    array.dtype_ = dlpack_dtype(tensor);
    array.contiguous_ = is_contiguous(array.shape_, tensor.strides, 1);
    array.place_ = place_of(tensor.device.type, tensor.device.id);
    array.data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
    array.null_ = false;
  }

  static void read_buffer(py::handle object, Array& array) {
    auto* view = new Py_buffer;
    if (PyObject_GetBuffer(object.ptr(), view, PyBUF_FULL_RO) != 0) {
      delete view;
      throw py::error_already_set();
    }
    array.keep_alive_ = std::shared_ptr<void>(view, [](void* pointer) {
      PyBuffer_Release(static_cast<Py_buffer*>(pointer));
      delete static_cast<Py_buffer*>(pointer);
    });
    array.shape_.assign(view->shape, view->shape + view->ndim);
    std::vector<int64_t> strides(view->strides, view->strides + (view->strides == nullptr ? 0 : view->ndim));
    array.contiguous_ =
        view->suboffsets == nullptr &&
        is_contiguous(array.shape_, view->strides == nullptr ? nullptr : strides.data(), view->itemsize);
    array.dtype_ = buffer_dtype(view->format, view->itemsize);
    array.read_only_ = view->readonly != 0;
    array.data_ = view->buf;
    array.null_ = false;
  }
};

const char* dtype_name(Dtype dtype) { return kDtypes[static_cast<int>(dtype)].name; }
int64_t dtype_bytes(Dtype dtype) { return kDtypes[static_cast<int>(dtype)].bytes; }

int64_t Array::num_bytes() const {
  if (null_) return 0;
  int64_t bytes = dtype_bytes(dtype_);
  for (int64_t size : shape_) bytes *= size;
  return bytes;
}

std::string place_name(int place) {
  if (place == kOnCpu) return "the CPU";
  return place >= 0 ? "cuda:" + std::to_string(place) : "another device";
}

void Arguments::require_place(const char* name, int place) {
  if (place_ == kUndecided && place != kElsewhere) {
    place_ = place;
    place_of_ = name;
  }
  if (place == place_) return;
  if (place_of_ != nullptr) {
    fail(std::string(name) + " must be on " + place_name(place_) + " as " + place_of_ + " is, got an array on " +
         place_name(place) + "; move it with .to(...)");
  }
  fail(std::string(name) + " must be C-contiguous on the CPU, got an array on " + place_name(place));
}

void* Arguments::stream(uintptr_t handle) const {
  if (handle != 0 && !on_cuda()) fail("stream must be 0 for arrays on the CPU");
  return reinterpret_cast<void*>(handle);
}

// expected() words what should have come: only for an error, because it takes as long as reading.
template <typename Expected>
Array Arguments::read(const char* name, py::handle object, const Expected& expected) {
  const auto refuse = [&](const std::string& what) {
    fail(std::string(name) + " must be " + expected() + ", C-contiguous on " + place_name(on_cuda() ? place_ : kOnCpu) +
         ", got " + what);
  };
  Array array;
  try {
    if (!ArrayReader::read(object, array)) {
      refuse(py::cast<std::string>(py::type::of(object).attr("__name__")));
    }
  } catch (py::error_already_set& error) {
    refuse("an array that cannot be exported (" + python_error_text(error) + ")");
  } catch (py::builtin_exception& error) {
    refuse("an array that cannot be exported (" + std::string(error.what()) + ")");
  }
  if (array.place_ == kElsewhere || (place_of_ == nullptr && place_ == kOnCpu && array.place_ != kOnCpu)) {
    refuse("an array on " + place_name(array.place_));
  }
  require_place(name, array.place_);
  return array;
}

const Array& Arguments::keep(const char* name, Array array, int64_t alignment, bool written) {
  if (written && array.read_only_) fail(std::string(name) + " must be writable, got a read-only array");
  const int64_t needed = std::max(alignment, dtype_bytes(array.dtype_));
  if (array.num_bytes() > 0 && reinterpret_cast<uintptr_t>(array.data_) % static_cast<uintptr_t>(needed) != 0) {
    fail(std::string(name) + " must start at a multiple of " + std::to_string(needed) + " bytes");
  }
  arrays_.push_back(std::move(array));
  const Array& kept = arrays_.back();
  entries_.push_back({name, kept.data_, kept.num_bytes(), written});
  return kept;
}

const Array& Arguments::add(const char* name, py::handle object, Dtype dtype, std::initializer_list<int64_t> shape,
                            int64_t alignment, bool written) {
  const auto expected = [&] { return describe(dtype, shape); };
  Array array = read(name, object, expected);
  bool fits = array.dtype_ == dtype && array.shape_.size() == shape.size();
  for (size_t dim = 0; fits && dim < shape.size(); ++dim) {
    fits = shape.begin()[dim] == kAny || shape.begin()[dim] == array.shape_[dim];
  }
  if (!fits || !array.contiguous_) {
    fail(std::string(name) + " must be " + expected() + ", C-contiguous on " + place_name(place_) + ", got " +
         (array.contiguous_ ? "" : "a strided ") + describe(array.dtype_, array.shape_));
  }
  return keep(name, std::move(array), alignment, written);
}

const Array& Arguments::storage(const char* name, py::handle object, Dtype dtype, int64_t count, int64_t alignment,
                                bool written) {
  const auto expected = [&] { return std::string(dtype_name(dtype)) + " of " + std::to_string(count) + " elements"; };
  Array array = read(name, object, expected);
  if (array.dtype_ != dtype || array.num_bytes() != count * dtype_bytes(dtype) || !array.contiguous_) {
    fail(std::string(name) + " must be " + expected() + ", C-contiguous on " + place_name(place_) + ", got " +
         (array.contiguous_ ? "" : "a strided ") + describe(array.dtype_, array.shape_));
  }
  return keep(name, std::move(array), alignment, written);
}

const Array& Arguments::input(const char* name, py::handle object, Dtype dtype, std::initializer_list<int64_t> shape,
                              int64_t alignment) {
  return add(name, object, dtype, shape, alignment, false);
}

const Array& Arguments::output(const char* name, py::handle object, Dtype dtype, std::initializer_list<int64_t> shape,
                               int64_t alignment) {
  return add(name, object, dtype, shape, alignment, true);
}

const Array& Arguments::optional_input(const char* name, py::handle object, Dtype dtype,
                                       std::initializer_list<int64_t> shape, int64_t alignment) {
  if (!object.is_none()) return add(name, object, dtype, shape, alignment, false);
  return arrays_.emplace_back();
}

const Array& Arguments::optional_output(const char* name, py::handle object, Dtype dtype,
                                        std::initializer_list<int64_t> shape, int64_t alignment) {
  if (!object.is_none()) return add(name, object, dtype, shape, alignment, true);
  return arrays_.emplace_back();
}

const Array& Arguments::workspace(py::handle object, int64_t min_bytes) {
  const Array& array = add("workspace", object, Dtype::u8, {kAny}, min_bytes > 0 ? 64 : 1, true);
  if (array.size(0) < min_bytes) {
    fail("workspace must be uint8 [>= " + std::to_string(min_bytes) + "], C-contiguous on " + place_name(place_) +
         ", got " + describe(array.dtype_, array.shape_));
  }
  return array;
}

void Arguments::also_reads(const char* name, const void* data, int64_t num_bytes) {
  entries_.push_back({name, data, num_bytes, false});
}

void Arguments::check_aliases() const {
  for (const Entry& written : entries_) {
    if (!written.written || written.num_bytes == 0) continue;
    const auto begin = reinterpret_cast<uintptr_t>(written.data);
    for (const Entry& other : entries_) {
      if (&other == &written || other.num_bytes == 0) continue;
      const auto other_begin = reinterpret_cast<uintptr_t>(other.data);
      if (begin < other_begin + static_cast<uintptr_t>(other.num_bytes) &&
          other_begin < begin + static_cast<uintptr_t>(written.num_bytes)) {
        fail(std::string(written.name) + " must not share memory with " + other.name);
      }
    }
  }
}

void Arguments::check_indices(const char* name, const Array& indices, int64_t limit) const {
  if (on_cuda()) return;
  const int64_t* values = indices.as<int64_t>();
  const int64_t count = indices.num_bytes() / 8;
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < 0 || values[i] >= limit) {
      fail(std::string(name) + " must be in 0.." + std::to_string(limit - 1) + ", got " + std::to_string(values[i]) +
           " at position " + std::to_string(i));
    }
  }
}

void Arguments::fail(const std::string& message) const {
  throw InvalidArgument(std::string(function_) + ": " + message);
}

Array Arguments::take(const Array& array) { return std::move(const_cast<Array&>(array)); }

}  // namespace chainfed::bind

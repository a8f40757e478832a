// The border between Python arrays and the core: any array that speaks DLPack (CPU or CUDA) or the buffer protocol
// becomes a checked pointer. A binding opens one `Arguments` per call, takes every array through it, calls
// `check_aliases`, releases the GIL and calls the kernel. `Arguments` keeps the arrays alive and must be destroyed with
// the GIL held.
//
//   Arguments args("linear_forward");
//   const Array& x = args.input("x", x_object, Dtype::f32, {kAny, num_cols});
//   const Array& out = args.output("out", out_object, Dtype::f32, {x.size(0), num_rows});
//   args.check_aliases();
//   py::gil_scoped_release nogil;
//   kernel(x.as<float>(), out.mutable_as<float>());
//
// Errors are InvalidArgument, worded "function: argument must be float32 [128, 4096], C-contiguous on the CPU, got
// float32 [128, 4095]"; no buffer has been touched when one is thrown.
#pragma once
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace chainfed::bind {

namespace py = pybind11;

enum class Dtype : uint8_t { u8, i8, i16, i32, i64, f16, bf16, f32, f64, boolean, other };
const char* dtype_name(Dtype dtype);
int64_t dtype_bytes(Dtype dtype);

// Where an array is: kOnCpu, the number of a CUDA device, or somewhere that the core cannot use.
constexpr int kOnCpu = -1, kElsewhere = -2;
std::string place_name(int place);

constexpr int64_t kAny = -1;  // a dimension the call takes from the array

// One array for the duration of a call (or of a Matrix). Move-only: it owns the exporter's reference.
class Array {
 public:
  Array() = default;
  Array(Array&&) = default;
  Array& operator=(Array&&) = default;

  int place() const { return place_; }
  bool is_null() const { return null_; }
  int64_t size(int dim) const { return shape_[dim]; }
  const std::vector<int64_t>& shape() const { return shape_; }
  int64_t num_bytes() const;
  const void* data() const { return data_; }
  void* mutable_data() const { return data_; }
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data_);
  }
  template <typename T>
  T* mutable_as() const {
    return static_cast<T*>(data_);
  }

 private:
  friend class ArrayReader;
  friend class Arguments;
  void* data_ = nullptr;
  std::vector<int64_t> shape_;
  Dtype dtype_ = Dtype::other;
  bool read_only_ = false;
  bool contiguous_ = true;
  int place_ = kOnCpu;
  bool null_ = true;
  std::shared_ptr<void> keep_alive_;
};

class Arguments {
 public:
  // A call works on the CPU unless it says that it also runs on CUDA; then its first array or matrix decides where, and
  // all others must be there too.
  enum class Devices : uint8_t { cpu, any };
  explicit Arguments(const char* function, Devices devices = Devices::cpu)
      : function_(function), place_(devices == Devices::cpu ? kOnCpu : kUndecided) {}

  bool on_cuda() const { return place_ >= 0; }
  int place() const { return place_; }
  // Memory of this name is at `place`: decides the call's, or throws when it is another one.
  void require_place(const char* name, int place);
  // The caller's stream (an address); throws when one is given for arrays on the CPU.
  void* stream(uintptr_t handle) const;

  // alignment in bytes, beyond that of the element type; references stay valid for the life of Arguments.
  const Array& input(const char* name, py::handle object, Dtype dtype, std::initializer_list<int64_t> shape,
                     int64_t alignment = 1);
  // None gives a null Array.
  const Array& optional_input(const char* name, py::handle object, Dtype dtype, std::initializer_list<int64_t> shape,
                              int64_t alignment = 1);
  const Array& output(const char* name, py::handle object, Dtype dtype, std::initializer_list<int64_t> shape,
                      int64_t alignment = 1);
  const Array& optional_output(const char* name, py::handle object, Dtype dtype, std::initializer_list<int64_t> shape,
                               int64_t alignment = 1);
  // An array of exactly `count` elements in any shape: the codes or scales of a matrix.
  const Array& storage(const char* name, py::handle object, Dtype dtype, int64_t count, int64_t alignment,
                       bool written);
  // A writable u8 [>= min_bytes] array, 64-byte aligned.
  const Array& workspace(py::handle object, int64_t min_bytes);
  // Memory the call reads that is not an argument array (a Matrix), for check_aliases.
  void also_reads(const char* name, const void* data, int64_t num_bytes);
  // Keeps something alive until the call is over.
  void hold(std::shared_ptr<const void> held) { held_.push_back(std::move(held)); }
  // Throws when an output shares a byte with any other argument.
  void check_aliases() const;
  // Throws unless the indices are all in [0, limit). Indices on a device are not read: kernels pass over wrong ones.
  void check_indices(const char* name, const Array& indices, int64_t limit) const;
  [[noreturn]] void fail(const std::string& message) const;  // InvalidArgument("function: message")
  const char* function() const { return function_; }
  // Hands an array's ownership to something that outlives the call.
  Array take(const Array& array);

 private:
  struct Entry {
    const char* name;
    const void* data;
    int64_t num_bytes;
    bool written;
  };
  const Array& keep(const char* name, Array array, int64_t alignment, bool written);
  template <typename Expected>
  Array read(const char* name, py::handle object, const Expected& expected);
  static constexpr int kUndecided = -3;
  const Array& add(const char* name, py::handle object, Dtype dtype, std::initializer_list<int64_t> shape,
                   int64_t alignment, bool written);
  const char* function_;
  int place_;
  const char* place_of_ = nullptr;  // the argument that decided
  std::deque<Array> arrays_;
  std::vector<Entry> entries_;
  std::vector<std::shared_ptr<const void>> held_;
};

}  // namespace chainfed::bind

// The DLPack ABI, version 1: only what reading an array needs. The versioned struct is asked for first, since it alone
// carries the read-only flag. A class may also offer a table of C functions (version 1.3), which spares a call the
// microseconds that methods and capsules of Python take.
#pragma once
#include <cstdint>

namespace chainfed::bind {

constexpr int32_t kDlpackCpu = 1;
constexpr int32_t kDlpackCuda = 2;
constexpr int32_t kDlpackCudaHost = 3;  // page-locked host memory: the CPU's
constexpr uint32_t kDlpackMajor = 1;
constexpr uint64_t kDlpackReadOnly = 1;
enum DlpackCode : uint8_t { kDlpackInt = 0, kDlpackUint = 1, kDlpackFloat = 2, kDlpackBfloat = 4, kDlpackBool = 6 };

struct DlpackTensor {
  void* data;
  struct {
    int32_t type;
    int32_t id;
  } device;
  int32_t num_dims;
  struct {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: C-contiguous
  uint64_t byte_offset;
};

struct DlpackManaged {  // capsule "dltensor"
  DlpackTensor tensor;
  void* manager;
  void (*deleter)(DlpackManaged*);
};

struct DlpackManagedVersioned {  // capsule "dltensor_versioned"
  struct {
    uint32_t major;
    uint32_t minor;
  } version;
  void* manager;
  void (*deleter)(DlpackManagedVersioned*);
  uint64_t flags;
  DlpackTensor tensor;
};

struct DlpackExchange {  // capsule "dlpack_exchange_api", the attribute __dlpack_c_exchange_api__ of a class
  struct {
    uint32_t major;
    uint32_t minor;
  } version;
  DlpackExchange* previous;
  int (*allocate)();                                              // not called here
  int (*export_managed)(void* object, DlpackManagedVersioned**);  // not 0: a Python exception is set
};

}  // namespace chainfed::bind

// cuBLASLt without its header: opened by dlopen, so that neither building nor importing needs it. The numbers below are
// those of cublasLt.h, part of its stable ABI since CUDA 11.
#include "cuda/library_product.h"

#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>

#include "chainfed/error.h"
#include "cuda/prepare.h"

namespace chainfed::cuda {
namespace {

using Handle = void*;
using Status = int;

constexpr int kF32 = 0, kBf16 = 14, kComputeF32 = 68, kNoTranspose = 0, kTranspose = 1;
constexpr int kTransA = 3, kTransB = 4, kEpilogue = 7, kBiasPointer = 8;  // of a product
constexpr uint32_t kEpilogueBias = 4;
constexpr int kWorkspaceBytes = 1, kAlignmentA = 5;  // of a preference; B, C, D follow A

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};

struct Library {
  Handle handle = nullptr;
  Status (*create)(Handle*);
  Status (*product_create)(Handle*, int compute_type, int scale_type);
  Status (*product_destroy)(Handle);
  Status (*product_set)(Handle, int attribute, const void* value, size_t bytes);
  Status (*layout_create)(Handle*, int type, uint64_t rows, uint64_t cols, int64_t ld);
  Status (*layout_destroy)(Handle);
  Status (*preference_create)(Handle*);
  Status (*preference_destroy)(Handle);
  Status (*preference_set)(Handle, int attribute, const void* value, size_t bytes);
  Status (*choose)(Handle, Handle product, Handle a, Handle b, Handle c, Handle d, Handle preference, int wanted,
                   Heuristic* found, int* num_found);
  Status (*multiply)(Handle, Handle product, const void* alpha, const void* a, Handle a_layout, const void* b,
                     Handle b_layout, const void* beta, const void* c, Handle c_layout, void* d, Handle d_layout,
                     const Algorithm*, void* workspace, size_t workspace_bytes, void* stream);
  std::mutex mutex;
  // By direction, rows, cols, tokens, strides, whether it adds, whether it has a bias, alignments.
  using Key = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, int>;
  std::map<Key, Algorithm> chosen;
};

template <typename Function>
bool find(void* file, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(file, name));
  return function != nullptr;
}

#ifdef CHAINFED_CUBLASLT  // the emulated build has one of its own
constexpr const char* kNames[] = {CHAINFED_CUBLASLT};
#else
constexpr const char* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so.11", "libcublasLt.so"};
#endif

// For the life of the process; null when a function is missing or the library cannot work with this driver.
Library* open(void* file) {
  auto library = std::make_unique<Library>();
  const bool found = find(file, "cublasLtCreate", library->create) &&
                     find(file, "cublasLtMatmulDescCreate", library->product_create) &&
                     find(file, "cublasLtMatmulDescDestroy", library->product_destroy) &&
                     find(file, "cublasLtMatmulDescSetAttribute", library->product_set) &&
                     find(file, "cublasLtMatrixLayoutCreate", library->layout_create) &&
                     find(file, "cublasLtMatrixLayoutDestroy", library->layout_destroy) &&
                     find(file, "cublasLtMatmulPreferenceCreate", library->preference_create) &&
                     find(file, "cublasLtMatmulPreferenceDestroy", library->preference_destroy) &&
                     find(file, "cublasLtMatmulPreferenceSetAttribute", library->preference_set) &&
                     find(file, "cublasLtMatmulAlgoGetHeuristic", library->choose) &&
                     find(file, "cublasLtMatmul", library->multiply);
  return found && library->create(&library->handle) == 0 ? library.release() : nullptr;
}

// The one that the process has already, torch's, before any other: a second copy costs hundreds of MiB, and one of
// another version may want another driver.
Library* load() {
  for (const int already : {RTLD_NOLOAD, 0}) {
    for (const char* name : kNames) {
      void* file = dlopen(name, RTLD_NOW | RTLD_LOCAL | already);
      Library* library = file == nullptr ? nullptr : open(file);
      if (library != nullptr) return library;
      if (file != nullptr) dlclose(file);
    }
  }
  return nullptr;
}

void require(Status status, const char* what) {
  constexpr Status kAllocationFailed = 3;
  if (status == kAllocationFailed) {
    throw OutOfMemory("cuBLASLt: out of memory for " + std::string(what) + "; set a smaller [memory] budget");
  }
  if (status != 0) throw Error("cuBLASLt: " + std::string(what) + " failed with status " + std::to_string(status));
}

// A descriptor for the length of a call.
class Descriptor {
 public:
  explicit Descriptor(Status (*destroy)(Handle)) : destroy_(destroy) {}
  ~Descriptor() {
    if (handle_ != nullptr) destroy_(handle_);
  }
  Descriptor(const Descriptor&) = delete;
  Handle* fill() { return &handle_; }
  Handle get() const { return handle_; }

 private:
  Status (*destroy_)(Handle);
  Handle handle_ = nullptr;
};

constexpr size_t kOwnBytes = kLibraryWorkspaceBytes - 256;

void* round_up_to_256(void* pointer) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(pointer) + 255) / 256 * 256);
}

uint32_t alignment_of(const void* pointer, int64_t stride_bytes) {
  uint32_t alignment = 256;
  while ((reinterpret_cast<uintptr_t>(pointer) | static_cast<uintptr_t>(stride_bytes)) % alignment != 0) alignment /= 2;
  return alignment;
}

// The library's own choice for a product of this kind, asked for once.
Algorithm choose(Library& library, const Library::Key& key, Handle product, Handle a, Handle b, Handle d,
                 const uint32_t (&alignments)[4]) {
  std::lock_guard<std::mutex> lock(library.mutex);
  const auto known = library.chosen.find(key);
  if (known != library.chosen.end()) return known->second;
  Descriptor preference(library.preference_destroy);
  require(library.preference_create(preference.fill()), "a preference");
  const size_t bytes = kOwnBytes;
  require(library.preference_set(preference.get(), kWorkspaceBytes, &bytes, sizeof bytes), "a preference");
  for (int i = 0; i < 4; ++i) {
    require(library.preference_set(preference.get(), kAlignmentA + i, &alignments[i], sizeof alignments[i]),
            "a preference");
  }
  Heuristic found{};
  int num_found = 0;
  const Status status = library.choose(library.handle, product, a, b, d, d, preference.get(), 1, &found, &num_found);
  constexpr Status kNotSupported = 15;
  if (status != kNotSupported) require(status, "the choice of an algorithm");
  if (status != 0 || num_found < 1 || found.state != 0 || found.workspace_bytes > bytes) {
    throw UnsupportedHardware("cuBLASLt: knows no algorithm for this product of " + std::to_string(std::get<3>(key)) +
                              " tokens; set CHAINFED_CUDA_LIBRARY_FROM to a larger number (int4, nf4 and int8 layers "
                              "do without it)");
  }
  return library.chosen[key] = found.algorithm;
}

}  // namespace

// out = bias and then out += product: the library reads a bias 16 bytes at a time.
void product_onto_bias(void* opened, Stream stream, LibraryCall call) {
  launch<BiasRows>(stream, BiasRows::grid(call.num_tokens),
                   {call.bias, call.num_rows, call.out, call.out_stride, call.accumulate});
  call.bias = nullptr;
  call.accumulate = true;
  library_product(opened, stream, call);
}

// One handle a device: it belongs to the device that is current.
void* open_library() { return load(); }

// Column-major, as the library counts: D [outputs, tokens] = op(W) X. Rows of ours are columns of its.
void library_product(void* opened, Stream stream, const LibraryCall& call) {
  auto& library = *static_cast<Library*>(opened);
  if (reinterpret_cast<uintptr_t>(call.bias) % 16 != 0) return product_onto_bias(opened, stream, call);
  const bool forward = call.direction == Direction::forward;
  const int64_t outputs = forward ? call.num_rows : call.num_cols, summed = forward ? call.num_cols : call.num_rows;
  Descriptor product(library.product_destroy), a(library.layout_destroy), b(library.layout_destroy);
  Descriptor d(library.layout_destroy);
  require(library.product_create(product.fill(), kComputeF32, kF32), "a product's descriptor");
  const int trans_a = forward ? kTranspose : kNoTranspose, trans_b = kNoTranspose;
  require(library.product_set(product.get(), kTransA, &trans_a, sizeof trans_a), "transposition");
  require(library.product_set(product.get(), kTransB, &trans_b, sizeof trans_b), "transposition");
  if (call.bias != nullptr) {
    require(library.product_set(product.get(), kEpilogue, &kEpilogueBias, sizeof kEpilogueBias), "the bias");
    require(library.product_set(product.get(), kBiasPointer, &call.bias, sizeof call.bias), "the bias");
  }
  require(library.layout_create(a.fill(), kBf16, static_cast<uint64_t>(call.num_cols),
                                static_cast<uint64_t>(call.num_rows), call.w_stride),
          "a layout");
  require(library.layout_create(b.fill(), kBf16, static_cast<uint64_t>(summed), static_cast<uint64_t>(call.num_tokens),
                                call.x_stride),
          "a layout");
  require(library.layout_create(d.fill(), kF32, static_cast<uint64_t>(outputs), static_cast<uint64_t>(call.num_tokens),
                                call.out_stride),
          "a layout");
  const uint32_t alignments[4] = {alignment_of(call.w, 2 * call.w_stride), alignment_of(call.x, 2 * call.x_stride),
                                  alignment_of(call.out, 4 * call.out_stride),
                                  alignment_of(call.out, 4 * call.out_stride)};
  const Library::Key key{static_cast<int>(call.direction),
                         call.num_rows,
                         call.num_cols,
                         call.num_tokens,
                         call.w_stride,
                         call.x_stride,
                         call.out_stride,
                         (call.accumulate ? 1 : 0) + (call.bias != nullptr ? 2 : 0),
                         static_cast<int>(alignments[0] * 1024 + alignments[1]),
                         static_cast<int>(alignments[2])};
  const Algorithm algorithm = choose(library, key, product.get(), a.get(), b.get(), d.get(), alignments);
  const float one = 1.0f, beta = call.accumulate ? 1.0f : 0.0f;
  require(library.multiply(library.handle, product.get(), &one, call.w, a.get(), call.x, b.get(), &beta, call.out,
                           d.get(), call.out, d.get(), &algorithm, round_up_to_256(call.workspace), kOwnBytes, stream),
          "a product");
}

}  // namespace chainfed::cuda

// A cuBLASLt with plain loops: the functions that library_product.cu asks for, with the argument order, the attribute
// numbers and the column-major meaning of cublasLt.h (since CUDA 11), and the refusals that the real one has: a
// workspace that is not aligned to 256 bytes, a bias or a matrix less aligned than its preference promised, an
// algorithm that does not belong to the product. CHAINFED_FAKE_CUDA="cublasLtCreate=1" in the environment makes a
// function return a status, "algorithms=0" makes the choice come back empty.
#include <cstdint>
#include <cstring>

#include "base/half.h"
#include "setting.h"

namespace {

using chainfed::bf16_to_float;
using fake_cuda::setting;

constexpr int kOk = 0, kInvalidValue = 7, kNotSupported = 15;
constexpr int kF32 = 0, kBf16 = 14, kCompute32F = 68;
constexpr uint64_t kMark = 0x6368616966656431;

struct Product {
  int compute, scale, trans_a = 0, trans_b = 0;
  uint32_t epilogue = 1;
  const float* bias = nullptr;
};
struct Layout {
  int type;
  uint64_t rows, cols;
  int64_t ld;
};
struct Preference {
  size_t workspace = 0;
  uint32_t alignment[4] = {256, 256, 256, 256};
};
struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Heuristic) == 96, "cublasLtMatmulHeuristicResult_t");

bool aligned(const void* pointer, uint64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// What makes an algorithm fit: the shapes, and the alignments that were promised.
void describe(const Product& p, const Layout& a, const Layout& b, const Layout& d, uint64_t* data) {
  data[0] = kMark;
  data[1] = a.rows << 32 | a.cols;
  data[2] = b.rows << 32 | b.cols;
  data[3] = static_cast<uint64_t>(a.ld) << 32 | static_cast<uint64_t>(d.ld);
  data[4] = static_cast<uint64_t>(p.trans_a) | p.epilogue << 8;
}

float element(const void* base, const Layout& layout, uint64_t row, uint64_t col) {
  return bf16_to_float(static_cast<const uint16_t*>(base)[row + col * static_cast<uint64_t>(layout.ld)]);
}

}  // namespace

extern "C" {

int cublasLtCreate(void** handle) {
  static int the_handle;
  *handle = &the_handle;
  return setting("cublasLtCreate", kOk);
}

int cublasLtMatmulDescCreate(void** out, int compute, int scale) {
  if (compute != kCompute32F || scale != kF32) return kNotSupported;
  *out = new Product{compute, scale};
  return kOk;
}
int cublasLtMatmulDescDestroy(void* product) {
  delete static_cast<Product*>(product);
  return kOk;
}
int cublasLtMatmulDescSetAttribute(void* object, int attribute, const void* value, size_t bytes) {
  auto& product = *static_cast<Product*>(object);
  const auto set = [&](auto& field) {
    if (bytes != sizeof field) return kInvalidValue;
    std::memcpy(&field, value, bytes);
    return kOk;
  };
  switch (attribute) {
    case 3:
      return set(product.trans_a);
    case 4:
      return set(product.trans_b);
    case 7:
      return set(product.epilogue);
    case 8:
      return set(product.bias);
    default:
      return kInvalidValue;
  }
}

int cublasLtMatrixLayoutCreate(void** out, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  if (ld < static_cast<int64_t>(rows)) return kInvalidValue;
  *out = new Layout{type, rows, cols, ld};
  return kOk;
}
int cublasLtMatrixLayoutDestroy(void* layout) {
  delete static_cast<Layout*>(layout);
  return kOk;
}

int cublasLtMatmulPreferenceCreate(void** out) {
  *out = new Preference;
  return kOk;
}
int cublasLtMatmulPreferenceDestroy(void* preference) {
  delete static_cast<Preference*>(preference);
  return kOk;
}
int cublasLtMatmulPreferenceSetAttribute(void* object, int attribute, const void* value, size_t bytes) {
  auto& preference = *static_cast<Preference*>(object);
  if (attribute == 1 && bytes == sizeof(size_t)) {
    std::memcpy(&preference.workspace, value, bytes);
    return kOk;
  }
  if (attribute < 5 || attribute > 8 || bytes != 4) return kInvalidValue;
  std::memcpy(&preference.alignment[attribute - 5], value, bytes);
  return kOk;
}

int cublasLtMatmulAlgoGetHeuristic(void*, void* product, void* a, void* b, void*, void* d, void* wish, int wanted,
                                   Heuristic* found, int* num_found) {
  const auto& preference = *static_cast<Preference*>(wish);
  *num_found = setting("algorithms", 1);
  if (wanted < 1 || preference.workspace == 0) return kInvalidValue;
  *found = Heuristic{};
  describe(*static_cast<Product*>(product), *static_cast<Layout*>(a), *static_cast<Layout*>(b),
           *static_cast<Layout*>(d), found->algorithm.data);
  for (int i = 0; i < 4; ++i) found->algorithm.data[5] |= uint64_t{preference.alignment[i]} << 16 * i;
  found->workspace_bytes = preference.workspace;
  return setting("cublasLtMatmulAlgoGetHeuristic", kOk);
}

// D = alpha op(A) B + beta C (+ bias along D's columns), all column-major.
int cublasLtMatmul(void*, void* object, const void* alpha, const void* a, void* a_layout, const void* b, void* b_layout,
                   const void* beta, const void* c, void* c_layout, void* d, void* d_layout, const Algorithm* algorithm,
                   void* workspace, size_t workspace_bytes, void*) {
  const auto& product = *static_cast<Product*>(object);
  const Layout &la = *static_cast<Layout*>(a_layout), &lb = *static_cast<Layout*>(b_layout);
  const Layout &lc = *static_cast<Layout*>(c_layout), &ld = *static_cast<Layout*>(d_layout);
  uint64_t expected[8] = {};
  describe(product, la, lb, ld, expected);
  if (std::memcmp(expected, algorithm->data, 5 * sizeof(uint64_t)) != 0) return kNotSupported;
  const void* operands[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    if (!aligned(operands[i], algorithm->data[5] >> 16 * i & 0xFFFF)) return kNotSupported;
  }
  if (!aligned(workspace, 256) || workspace_bytes == 0 || (product.epilogue == 4 && !aligned(product.bias, 16))) {
    return kInvalidValue;
  }
  if (la.type != kBf16 || lb.type != kBf16 || lc.type != kF32 || ld.type != kF32 || product.trans_b != 0) {
    return kNotSupported;
  }
  const bool transposed = product.trans_a == 1;
  const uint64_t m = transposed ? la.cols : la.rows, k = transposed ? la.rows : la.cols;
  if (lb.rows != k || ld.rows != m || ld.cols != lb.cols || (c == d && (lc.ld != ld.ld || lc.rows != ld.rows))) {
    return kInvalidValue;
  }
  const float scale = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
  for (uint64_t col = 0; col < ld.cols; ++col) {
    for (uint64_t row = 0; row < m; ++row) {
      double sum = 0;
      for (uint64_t i = 0; i < k; ++i) {
        const float left = transposed ? element(a, la, i, row) : element(a, la, row, i);
        sum += static_cast<double>(left) * element(b, lb, i, col);
      }
      sum *= scale;
      if (keep != 0) sum += keep * static_cast<const float*>(c)[row + col * static_cast<uint64_t>(lc.ld)];
      if (product.epilogue == 4) sum += product.bias[row];
      static_cast<float*>(d)[row + col * static_cast<uint64_t>(ld.ld)] = static_cast<float>(sum);
    }
  }
  return setting("cublasLtMatmul", kOk);
}

}  // extern "C"

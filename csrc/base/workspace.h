// Carves typed pieces out of one caller-owned workspace. The same code, run over a null base, computes the size to
// ask for, so that a kernel and its *_workspace_bytes function cannot disagree.
#pragma once
#include <cstddef>
#include <cstdint>

#include "chainfed/error.h"

namespace chainfed {

constexpr int64_t kWorkspaceAlignment = 64;

class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  // count elements of T at 64-byte alignment; null while measuring (base null).
  template <typename T>
  T* take(int64_t count) {
    int64_t bytes = 0, end = 0;
    if (count < 0 || __builtin_mul_overflow(count, static_cast<int64_t>(sizeof(T)), &bytes) ||
        __builtin_add_overflow(bytes, kWorkspaceAlignment - 1, &bytes) ||
        __builtin_add_overflow(used_, bytes / kWorkspaceAlignment * kWorkspaceAlignment, &end)) {
      throw InvalidArgument("workspace size overflows 64 bits");
    }
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ = end;
    return piece;
  }

  int64_t used_bytes() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace chainfed

// A frozen matrix as Python holds it: a MatrixView plus whatever keeps its memory alive. A matrix from arrays is
// always valid; one from a lease is valid until the lease is released, and says so instead of reading the slot's next
// tenant.
#pragma once
#include <pybind11/pybind11.h>

#include <functional>
#include <memory>

#include "bind/array.h"
#include "chainfed/block_format.h"

namespace chainfed::bind {

// Element types and counts of a matrix's two arrays.
struct Storage {
  Dtype codes_dtype;
  int64_t codes_count;
  Dtype scales_dtype;
  int64_t scales_count;  // 0: the format has no scales
};
Storage storage_of(BlockFormat format, int64_t num_rows, int64_t num_cols);

class Matrix {
 public:
  // Keeps the memory where it is until the result is dropped; throws InvalidArgument once it is gone.
  using Pin = std::function<std::shared_ptr<const void>()>;
  // keep_alive is dropped with the GIL held. An empty pin: always valid. place: where the view's memory is.
  Matrix(std::shared_ptr<void> keep_alive, const MatrixView& view, Pin pin = {}, int place = kOnCpu);
  static Matrix from_arrays(py::handle codes, py::handle scales, const std::string& block_format, int64_t num_rows,
                            int64_t num_cols);

  // The view for one call; throws InvalidArgument("function: ... released") after the lease's release. Its memory is
  // entered into the call's alias check and stays pinned while `args` lives, whatever other threads release.
  const MatrixView& view(Arguments& args) const;
  // Shape and format outlive the lease.
  int64_t num_rows() const { return view_.num_rows; }
  int64_t num_cols() const { return view_.num_cols; }
  BlockFormat format() const { return view_.format; }
  int place() const { return place_; }

 private:
  std::shared_ptr<void> keep_alive_;
  MatrixView view_;
  Pin pin_;
  int place_;
};

}  // namespace chainfed::bind

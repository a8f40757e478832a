#include "bind/matrix.h"

#include <string>
#include <utility>

#include "chainfed/error.h"

namespace chainfed::bind {
namespace {

struct ArrayPair {
  Array codes, scales;
};

}  // namespace

Storage storage_of(BlockFormat format, int64_t num_rows, int64_t num_cols) {
  const int64_t codes = codes_bytes(format, num_rows, num_cols);
  const int64_t scales = scales_bytes(format, num_rows, num_cols);
  switch (format) {
    case BlockFormat::int4:
      return {Dtype::u8, codes, Dtype::f16, scales / 2};
    case BlockFormat::nf4:
      return {Dtype::u8, codes, Dtype::f32, scales / 4};
    case BlockFormat::int8:
      return {Dtype::i8, codes, Dtype::f16, scales / 2};
    case BlockFormat::bf16:
      return {Dtype::bf16, codes / 2, Dtype::f32, 0};
    case BlockFormat::f32:
      return {Dtype::f32, codes / 4, Dtype::f32, 0};
  }
  throw InvalidArgument("unknown block format");
}

Matrix::Matrix(std::shared_ptr<void> keep_alive, const MatrixView& view, Pin pin, int place)
    : keep_alive_(std::move(keep_alive)), view_(view), pin_(std::move(pin)), place_(place) {}

Matrix Matrix::from_arrays(py::handle codes, py::handle scales, const std::string& block_format, int64_t num_rows,
                           int64_t num_cols) {
  Arguments args("Matrix.from_arrays", Arguments::Devices::any);
  const BlockFormat format = parse_block_format(block_format.c_str());
  const Storage storage = storage_of(format, num_rows, num_cols);
  // Tiles start on cache lines; row-major matrices need no more than their element's alignment.
  const int64_t codes_alignment = storage.scales_count == 0 ? 1 : 64;
  const Array& code_array =
      args.storage("codes", codes, storage.codes_dtype, storage.codes_count, codes_alignment, false);
  if (storage.scales_count == 0 && !scales.is_none()) args.fail("scales must be None for " + block_format);
  if (storage.scales_count != 0 && scales.is_none()) args.fail("scales must not be None for " + block_format);
  auto kept = std::make_shared<ArrayPair>();
  MatrixView view{format, num_rows, num_cols, code_array.data(), nullptr};
  if (storage.scales_count != 0) {
    const Array& scale_array = args.storage("scales", scales, storage.scales_dtype, storage.scales_count, 32, false);
    view.scales = scale_array.data();
    kept->scales = args.take(scale_array);
  }
  kept->codes = args.take(code_array);
  return Matrix(std::move(kept), view, {}, args.place());
}

const MatrixView& Matrix::view(Arguments& args) const {
  args.require_place("matrix", place_);
  if (pin_) {
    try {
      args.hold(pin_());
    } catch (const InvalidArgument& error) {
      args.fail(error.what());
    }
  }
  args.also_reads("matrix", view_.codes, codes_bytes(view_.format, view_.num_rows, view_.num_cols));
  args.also_reads("matrix", view_.scales, scales_bytes(view_.format, view_.num_rows, view_.num_cols));
  return view_;
}

}  // namespace chainfed::bind

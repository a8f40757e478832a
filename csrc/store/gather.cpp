#include "store/gather.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "chainfed/error.h"
#include "chainfed/kernels.h"

namespace chainfed {
namespace {

constexpr int64_t kScratchBytes = int64_t{1} << 20;
// A hole smaller than this is read along: a request costs as much time as this many bytes.
constexpr int64_t kMergeGapBytes = int64_t{64} << 10;

// The smallest run of rows that lies in one piece: 8 rows of tiles, or one row of an unpacked format.
struct GroupLayout {
  int64_t rows, codes_bytes, scales_bytes;
};

GroupLayout group_layout(const TensorEntry& tensor) {
  const bool tiled = padded_rows(tensor.format, kTileRows - 1) == kTileRows;
  const int64_t rows = tiled ? kTileRows : 1;
  return {rows, codes_bytes(tensor.format, rows, tensor.num_cols), scales_bytes(tensor.format, rows, tensor.num_cols)};
}

struct FreeDeleter {
  void operator()(void* memory) const { std::free(memory); }
};
using AlignedBytes = std::unique_ptr<char, FreeDeleter>;

AlignedBytes allocate_aligned(int64_t bytes) {
  void* memory = nullptr;
  if (::posix_memalign(&memory, kReadAlignment, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
  return AlignedBytes(static_cast<char*>(memory));
}

// Bytes [begin, begin + bytes) of the file inside scratch, read from aligned borders.
int64_t span_with_borders(int64_t bytes) { return bytes > 0 ? round_up(bytes, kReadAlignment) + kReadAlignment : 0; }

const char* read_span(const GatherSource& source, int64_t begin, int64_t bytes, char* scratch) {
  if (bytes == 0) return nullptr;
  const int64_t aligned_begin = round_down(begin, kReadAlignment);
  read_exact(source.file, source.path, scratch, begin + bytes - aligned_begin, aligned_begin, nullptr,
             &source.bytes_read);
  return scratch + (begin - aligned_begin);
}

// Positions of the output ordered by the row they ask for: repeated and neighbouring rows become neighbours.
std::vector<int64_t> order_by_row(const TensorEntry& tensor, const int64_t* row_ids, int64_t num_ids) {
  std::vector<int64_t> order(static_cast<size_t>(num_ids));
  for (int64_t i = 0; i < num_ids; ++i) {
    if (row_ids[i] < 0 || row_ids[i] >= tensor.num_rows) {
      throw InvalidArgument("row id " + std::to_string(row_ids[i]) + " at position " + std::to_string(i) + " of '" +
                            tensor.name + "', expected 0 to " + std::to_string(tensor.num_rows - 1));
    }
    order[static_cast<size_t>(i)] = i;
  }
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return row_ids[a] < row_ids[b]; });
  return order;
}

class Gatherer {
 public:
  Gatherer(const GatherSource& source, const int64_t* row_ids, float* out)
      : source_(source), row_ids_(row_ids), out_(out), layout_(group_layout(source.tensor)) {
    const int64_t group_bytes = layout_.codes_bytes + layout_.scales_bytes;
    const int64_t borders = span_with_borders(1) + (layout_.scales_bytes > 0 ? span_with_borders(1) : 0);
    max_groups_ = std::max<int64_t>(1, (kScratchBytes - borders) / group_bytes);
  }

  void run(int64_t num_ids) {
    const std::vector<int64_t> order = order_by_row(source_.tensor, row_ids_, num_ids);
    size_t begin = 0;
    while (begin < order.size()) {
      const size_t end = end_of_piece(order, begin);
      read_piece(order, begin, end);
      begin = end;
    }
  }

 private:
  int64_t group_of(int64_t position) const { return row_ids_[position] / layout_.rows; }

  // The ids from `begin` on that one pair of requests serves.
  size_t end_of_piece(const std::vector<int64_t>& order, size_t begin) const {
    const int64_t first_group = group_of(order[begin]);
    int64_t last_group = first_group;
    size_t end = begin + 1;
    for (; end < order.size(); ++end) {
      const int64_t group = group_of(order[end]);
      const int64_t hole_bytes = (group - last_group - 1) * layout_.codes_bytes;
      if (group - first_group >= max_groups_ || hole_bytes > kMergeGapBytes) break;
      last_group = group;
    }
    return end;
  }

  void read_piece(const std::vector<int64_t>& order, size_t begin, size_t end) {
    const TensorEntry& tensor = source_.tensor;
    const int64_t first_group = group_of(order[begin]);
    const int64_t num_groups = group_of(order[end - 1]) - first_group + 1;
    const int64_t first_row = first_group * layout_.rows;
    const int64_t codes = num_groups * layout_.codes_bytes, scales = num_groups * layout_.scales_bytes;
    reserve(span_with_borders(codes), span_with_borders(scales));
    const auto start = std::chrono::steady_clock::now();
    const char* codes_at =
        read_span(source_, tensor.codes_offset + first_group * layout_.codes_bytes, codes, scratch_.get());
    const char* scales_at = read_span(source_, tensor.scales_offset + first_group * layout_.scales_bytes, scales,
                                      scratch_.get() + span_with_borders(codes));
    const auto elapsed = std::chrono::steady_clock::now() - start;
    source_.read_ns.fetch_add(std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count());
    const int64_t num_rows = std::min(num_groups * layout_.rows, tensor.num_rows - first_row);
    const MatrixView view{tensor.format, num_rows, tensor.num_cols, codes_at, scales_at};
    for (size_t i = begin; i < end; ++i) {
      const int64_t local_row = row_ids_[order[i]] - first_row;
      gather_rows(view, &local_row, 1, out_ + order[i] * tensor.num_cols);
    }
  }

  void reserve(int64_t codes_span, int64_t scales_span) {
    if (codes_span + scales_span <= scratch_bytes_) return;
    scratch_.reset();
    scratch_bytes_ = codes_span + scales_span;
    scratch_ = allocate_aligned(scratch_bytes_);
  }

  const GatherSource& source_;
  const int64_t* const row_ids_;
  float* const out_;
  const GroupLayout layout_;
  int64_t max_groups_ = 1;
  int64_t scratch_bytes_ = 0;
  AlignedBytes scratch_;
};

}  // namespace

void gather_rows_from_file(const GatherSource& source, const int64_t* row_ids, int64_t num_ids, float* out) {
  if (num_ids == 0) return;
  Gatherer(source, row_ids, out).run(num_ids);
}

}  // namespace chainfed

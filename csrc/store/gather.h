// The embedding lookup without a slot: read from the file only the groups of rows that the ids need, a bounded piece
// at a time, and decode them.
#pragma once
#include <atomic>
#include <cstdint>
#include <string>

#include "chainfed/store.h"
#include "store/file.h"

namespace chainfed {

struct GatherSource {
  ReadFile& file;
  const std::string& path;
  const TensorEntry& tensor;
  std::atomic<int64_t>& bytes_read;
  std::atomic<int64_t>& read_ns;
};

// out[t] = row row_ids[t], f32 [num_ids, num_cols]. Scratch: at most 1 MiB, or one group of 8 rows where that is more.
// Throws InvalidArgument for an id outside [0, num_rows), else as read_exact.
void gather_rows_from_file(const GatherSource& source, const int64_t* row_ids, int64_t num_ids, float* out);

}  // namespace chainfed

#include "store/index.h"

#include <algorithm>
#include <set>

#include "chainfed/error.h"

namespace chainfed {
namespace {

constexpr int64_t kCodesAlignment = 64;
constexpr int64_t kScalesAlignment = 32;

struct Range {
  int64_t begin, end;
  const std::string* tensor;
};

[[noreturn]] void fail(const FileEntry& entry, const TensorEntry& tensor, const std::string& what) {
  throw CorruptFile("the index of " + entry.path + ", tensor '" + tensor.name + "': " + what +
                    "; convert the model again");
}

// One of a tensor's two ranges: starts aligned, has the expected size, lies inside the file.
void check_range(const FileEntry& entry, const TensorEntry& tensor, const char* part, int64_t offset, int64_t bytes,
                 int64_t expected_bytes, int64_t alignment) {
  if (bytes != expected_bytes) {
    fail(entry, tensor,
         std::string(part) + " take " + std::to_string(bytes) + " bytes, but " + block_format_name(tensor.format) +
             " [" + std::to_string(tensor.num_rows) + ", " + std::to_string(tensor.num_cols) + "] needs " +
             std::to_string(expected_bytes));
  }
  if (bytes == 0) {
    if (offset != 0) fail(entry, tensor, std::string(part) + " of 0 bytes must have offset 0");
    return;
  }
  if (offset < 0 || offset % alignment != 0) {
    fail(entry, tensor,
         std::string(part) + " start at offset " + std::to_string(offset) + ", expected a multiple of " +
             std::to_string(alignment));
  }
  if (bytes > entry.file_bytes || offset > entry.file_bytes - bytes) {
    fail(entry, tensor,
         std::string(part) + " of " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) +
             " do not fit the file of " + std::to_string(entry.file_bytes) + " bytes");
  }
}

void check_sizes(const FileEntry& entry, const TensorEntry& tensor) {
  int64_t expected_codes = 0, expected_scales = 0;
  try {
    expected_codes = codes_bytes(tensor.format, tensor.num_rows, tensor.num_cols);
    expected_scales = scales_bytes(tensor.format, tensor.num_rows, tensor.num_cols);
  } catch (const InvalidArgument& error) {
    fail(entry, tensor, error.what());
  }
  check_range(entry, tensor, "codes", tensor.codes_offset, tensor.codes_bytes, expected_codes, kCodesAlignment);
  check_range(entry, tensor, "scales", tensor.scales_offset, tensor.scales_bytes, expected_scales, kScalesAlignment);
}

}  // namespace

void check_file_entry(const FileEntry& entry) {
  if (entry.file_bytes < 0) {
    throw CorruptFile("the index of " + entry.path + " gives a size of " + std::to_string(entry.file_bytes) + " bytes");
  }
  std::set<std::string> names;
  std::vector<Range> ranges;
  for (const TensorEntry& tensor : entry.tensors) {
    if (tensor.name.empty() || !names.insert(tensor.name).second) fail(entry, tensor, "the name is empty or repeated");
    check_sizes(entry, tensor);
    ranges.push_back({tensor.codes_offset, tensor.codes_offset + tensor.codes_bytes, &tensor.name});
    if (tensor.scales_bytes > 0) {
      ranges.push_back({tensor.scales_offset, tensor.scales_offset + tensor.scales_bytes, &tensor.name});
    }
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].begin < ranges[i - 1].end) {
      throw CorruptFile("the index of " + entry.path + ": tensors '" + *ranges[i - 1].tensor + "' and '" +
                        *ranges[i].tensor + "' overlap at offset " + std::to_string(ranges[i].begin) +
                        "; convert the model again");
    }
  }
}

int find_tensor(const FileEntry& entry, const std::string& name) {
  for (size_t i = 0; i < entry.tensors.size(); ++i) {
    if (entry.tensors[i].name == name) return static_cast<int>(i);
  }
  std::string known;
  for (const TensorEntry& tensor : entry.tensors) known += (known.empty() ? "" : ", ") + tensor.name;
  throw InvalidArgument("no tensor '" + name + "' in " + entry.path + "; it holds: " + known);
}

}  // namespace chainfed

// The index of a store comes from disk: nothing in it is believed before this check. After it, every range of every
// tensor lies inside its file, is aligned, overlaps no other, and has the size its format and shape demand.
#pragma once
#include <cstdint>

#include "chainfed/store.h"

namespace chainfed {

// Throws CorruptFile naming the path and the tensor.
void check_file_entry(const FileEntry& entry);

// Position of a tensor in entry.tensors; throws InvalidArgument naming what the file holds.
int find_tensor(const FileEntry& entry, const std::string& name);

}  // namespace chainfed

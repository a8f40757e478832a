// The layer store's reader: a ring of equal slots, each holding one file of the store (a layer, the embedding, or a
// shard of the head). The only owner of weight memory. A prefetch thread fills slots with aligned direct reads
// (O_DIRECT; where the file system refuses it, plain reads whose pages are dropped from the page cache).
//
// acquire() pins a slot and returns a lease; release() unpins it. When every slot is pinned, acquire() of another
// file throws InvalidArgument (a planning error) instead of allocating. Unpinned slots are evicted least recently
// used first. Offsets and sizes in the index are checked against the real file before any read.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "chainfed/block_format.h"

namespace chainfed {

struct TensorEntry {
  std::string name;
  BlockFormat format;
  int64_t num_rows, num_cols;               // small tensors (biases, norms): format f32, num_rows 1
  int64_t codes_offset, codes_bytes;        // from the start of the file
  int64_t scales_offset, scales_bytes;      // 0, 0 when the format has none
};
struct FileEntry {
  std::string path;
  int64_t file_bytes;
  std::vector<TensorEntry> tensors;
};
struct ReaderStats {
  int64_t bytes_read, stall_ns, hits, misses, resident_bytes, read_ns;
};

class StoreReader;
// Valid until release() (or destruction); matrix() afterwards throws InvalidArgument.
class Lease {
 public:
  MatrixView matrix(const std::string& name) const;  // throws InvalidArgument naming what exists
  bool valid() const;
  void release();
  ~Lease();

 private:
  friend class StoreReader;
  struct State;
  std::shared_ptr<State> state_;
};

class StoreReader {
 public:
  // num_slots >= 1 buffers of max(file_bytes) rounded up to 4096. Slots are allocated on first use.
  StoreReader(std::vector<FileEntry> files, int num_slots, bool direct);
  ~StoreReader();
  void prefetch(int file);                   // returns at once; a no-op when resident, queued or no slot is free
  std::shared_ptr<Lease> acquire(int file);  // waits for the read; rethrows its error
  // Read the given rows of one tensor straight from disk, without a slot: the embedding lookup.
  void gather_rows_from_disk(int file, const std::string& name, const int64_t* row_ids, int64_t num_ids, float* out);
  ReaderStats stats() const;
  int64_t slot_bytes() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace chainfed

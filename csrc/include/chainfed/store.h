// The layer store's reader: a ring of equal slots, each holding one file of the store (a layer, the embedding, or a
// shard of the head). The only owner of weight memory. A prefetch thread fills slots with aligned direct reads
// (O_DIRECT; where the file system refuses it, plain reads whose pages are dropped from the page cache).
//
// acquire() pins a slot and returns a lease; release() unpins it. When every slot is pinned, acquire() of another
// file throws InvalidArgument (a planning error) instead of allocating. Unpinned slots are evicted least recently
// used first. Offsets and sizes in the index are checked against the real file before any read.
//
// A slot is address space until it is used, and holds only the pages of the file in it: memory in use is the sum of
// the resident files, at most num_slots * slot_bytes. All functions may be called from any thread. In a child made by
// fork() every call throws InvalidArgument: open a reader there instead.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "chainfed/block_format.h"

namespace chainfed {

struct TensorEntry {
  std::string name;
  BlockFormat format;
  int64_t num_rows, num_cols;           // small tensors (biases, norms): format f32, num_rows 1
  int64_t codes_offset, codes_bytes;    // from the start of the file
  int64_t scales_offset, scales_bytes;  // 0, 0 when the format has none
};
struct FileEntry {
  std::string path;
  int64_t file_bytes;
  std::vector<TensorEntry> tensors;
};
struct ReaderStats {
  int64_t bytes_read;      // from all files, slots and gathers
  int64_t stall_ns;        // time callers of acquire() waited for a read
  int64_t hits, misses;    // acquire() that found its file resident; that waited
  int64_t resident_bytes;  // memory that the slots hold now
  int64_t read_ns;         // time inside reads, whoever waited
};

class StoreReader;
class Ring;
struct Pinning;
class ReadFile;
// How the reader opens a path: tests put a file with faults here.
using FileOpener = std::function<std::unique_ptr<ReadFile>(const std::string& path, bool direct)>;

// Valid until release() (or destruction); matrix() afterwards throws InvalidArgument. Outlives its reader: the slot's
// memory goes when the last lease does.
class Lease {
 public:
  Lease(std::shared_ptr<Ring> ring, int slot, int file);
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  MatrixView matrix(const std::string& name) const;  // throws InvalidArgument naming what exists
  // The same tensor in a copy of the file's bytes that starts at `data`.
  MatrixView matrix_in(const std::string& name, const void* data) const;
  const void* data() const;  // the file's bytes; throws after release()
  int64_t file_bytes() const;
  std::vector<std::string> names() const;  // in the order of the index
  bool valid() const;
  void release();  // a second call does nothing
  // Keep the slot pinned until the result is destroyed even if release() comes first: hold it around a kernel that
  // runs while another thread may release. Throws InvalidArgument after release().
  std::shared_ptr<const Lease> pin() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

class StoreReader {
 public:
  // num_slots >= 1 buffers of max(file_bytes) rounded up to 4096. Slots are allocated on first use.
  StoreReader(std::vector<FileEntry> files, int num_slots, bool direct);
  // pinning: how every slot is page-locked for a device that copies from it or reads it in place (store/page_buffer.h).
  StoreReader(std::vector<FileEntry> files, int num_slots, bool direct, const FileOpener& open_file,
              std::shared_ptr<const Pinning> pinning = nullptr);
  StoreReader(std::vector<FileEntry> files, int num_slots, bool direct, std::shared_ptr<const Pinning> pinning);
  ~StoreReader();  // waits for the request in flight (at most 8 MiB)
  StoreReader(const StoreReader&) = delete;
  StoreReader& operator=(const StoreReader&) = delete;
  void prefetch(int file);                       // returns at once; a no-op when resident, queued or no slot is free
  std::shared_ptr<Lease> acquire(int file);      // waits for the read; throws its error, the next call reads again
  std::shared_ptr<Lease> try_acquire(int file);  // null unless the file is resident: never waits for a read
  // Read the given rows of one tensor straight from disk, without a slot: the embedding lookup.
  void gather_rows_from_disk(int file, const std::string& name, const int64_t* row_ids, int64_t num_ids, float* out);
  // The index's entry; throws InvalidArgument naming what the file holds.
  const TensorEntry& tensor(int file, const std::string& name) const;
  ReaderStats stats() const;
  int64_t slot_bytes() const;
  bool direct() const;  // every file is read past the page cache

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace chainfed

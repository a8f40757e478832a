// One open file of the store. `ReadFile` is what the reader needs of it, so that tests can replace the disk by one
// with faults; `open_direct_or_buffered` is the real one. `read_exact` turns short reads, interruptions and errors
// into complete data or an exception that names path and offset.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

namespace chainfed {

// Direct reads need memory, offset and length in multiples of this.
constexpr int64_t kReadAlignment = 4096;
// One request: large enough for full disk speed, short enough that closing never waits long.
constexpr int64_t kRequestBytes = int64_t{8} << 20;

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
constexpr int64_t round_down(int64_t value, int64_t unit) { return value / unit * unit; }

class ReadFile {
 public:
  virtual ~ReadFile() = default;
  virtual int64_t size() const = 0;  // now; -errno on failure
  // As pread: bytes read (0 at the end, may be short) or -errno. Thread-safe.
  virtual int64_t read(void* out, int64_t bytes, int64_t offset) = 0;
  virtual bool direct() const = 0;  // whether reads pass the page cache by
};

// A regular file, read with O_DIRECT when `direct` and the file system takes it, else through the page cache, whose
// pages are dropped after each read. Throws IoError when it cannot be opened, CorruptFile when it is no regular file.
std::unique_ptr<ReadFile> open_direct_or_buffered(const std::string& path, bool direct);

// Fill out[0, bytes) from `offset`. `out` is aligned to and has room for a multiple of kReadAlignment, `offset` is a
// multiple of it. Stops early, returning false, once *stop is true. Adds what the disk delivered to *bytes_read.
// Throws CorruptFile when the file ends early, IoError when the system refuses.
bool read_exact(ReadFile& file, const std::string& path, void* out, int64_t bytes, int64_t offset,
                const std::atomic<bool>* stop, std::atomic<int64_t>* bytes_read);

}  // namespace chainfed

#include "store/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <system_error>

#include "chainfed/error.h"

namespace chainfed {
namespace {

// A request through the page cache: its pages are dropped before the next one, so this bounds what stays behind.
constexpr int64_t kBufferedRequestBytes = int64_t{1} << 20;
// A disk may return short; one that keeps returning less than it could is broken.
constexpr int kMaxFruitlessReads = 8;

std::string describe(int error) { return std::system_category().message(error); }

class PosixFile final : public ReadFile {
 public:
  PosixFile(int descriptor, bool direct) : descriptor_(descriptor), direct_(direct) {}
  ~PosixFile() override { ::close(descriptor_); }
  PosixFile(const PosixFile&) = delete;
  PosixFile& operator=(const PosixFile&) = delete;

  int64_t size() const override {
    struct stat info;
    return ::fstat(descriptor_, &info) == 0 ? static_cast<int64_t>(info.st_size) : -static_cast<int64_t>(errno);
  }
  bool direct() const override { return direct_; }

  int64_t read(void* out, int64_t bytes, int64_t offset) override {
    if (!direct_) bytes = std::min(bytes, kBufferedRequestBytes);
    const ssize_t count = ::pread(descriptor_, out, static_cast<size_t>(bytes), static_cast<off_t>(offset));
    if (count < 0) return -static_cast<int64_t>(errno);
    // From the file's start: the kernel gives back only those of its units, up to 2 MiB, that the range covers whole.
    if (!direct_) ::posix_fadvise(descriptor_, 0, static_cast<off_t>(offset + count), POSIX_FADV_DONTNEED);
    return count;
  }

  // One aligned block, to learn whether the file system takes direct reads (some accept the flag and refuse the read).
  bool accepts_direct_reads() const {
    void* block = nullptr;
    if (::posix_memalign(&block, kReadAlignment, kReadAlignment) != 0) throw std::bad_alloc();
    ssize_t count;
    do {
      count = ::pread(descriptor_, block, kReadAlignment, 0);
    } while (count < 0 && errno == EINTR);
    const int error = count < 0 ? errno : 0;
    std::free(block);
    return error != EINVAL && error != EOPNOTSUPP;
  }

  // Pages that the writer of the file left in the page cache are not ours to keep; reading ahead would cache pages
  // that nobody drops.
  void forget_cached_pages() const {
    ::posix_fadvise(descriptor_, 0, 0, POSIX_FADV_DONTNEED);
    ::posix_fadvise(descriptor_, 0, 0, POSIX_FADV_RANDOM);
  }

 private:
  const int descriptor_;
  const bool direct_;
};

// O_NONBLOCK: opening a pipe put in a file's place must not wait for its writer.
int open_descriptor(const std::string& path, int extra_flags) {
  int descriptor;
  do {
    descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | extra_flags);
  } while (descriptor < 0 && errno == EINTR);
  return descriptor;
}

std::unique_ptr<PosixFile> open_posix(const std::string& path, bool direct) {
  const int descriptor = open_descriptor(path, direct ? O_DIRECT : 0);
  if (descriptor < 0) {
    const int error = errno;
    if (direct && (error == EINVAL || error == EOPNOTSUPP)) return nullptr;
    throw IoError("cannot open " + path + ": " + describe(error));
  }
  auto file = std::make_unique<PosixFile>(descriptor, direct);
  struct stat info;
  if (::fstat(descriptor, &info) != 0) throw IoError("cannot stat " + path + ": " + describe(errno));
  if (!S_ISREG(info.st_mode)) throw CorruptFile(path + " is not a regular file");
  return file;
}

[[noreturn]] void throw_ended_early(const std::string& path, int64_t expected_end, int64_t actual_end) {
  throw CorruptFile(path + " ends at byte " + std::to_string(actual_end) + ", but data up to byte " +
                    std::to_string(expected_end) + " was expected: the file was cut; convert the model again");
}

}  // namespace

std::unique_ptr<ReadFile> open_direct_or_buffered(const std::string& path, bool direct) {
  std::unique_ptr<PosixFile> file;
  if (direct) {
    file = open_posix(path, true);
    if (file != nullptr && !file->accepts_direct_reads()) file.reset();
  }
  if (file == nullptr) file = open_posix(path, false);
  file->forget_cached_pages();
  return file;
}

bool read_exact(ReadFile& file, const std::string& path, void* out, int64_t bytes, int64_t offset,
                const std::atomic<bool>* stop, std::atomic<int64_t>* bytes_read) {
  const int64_t unit = file.direct() ? kReadAlignment : 1;
  int64_t done = 0;
  int fruitless = 0;
  while (done < bytes) {
    if (stop != nullptr && stop->load(std::memory_order_relaxed)) return false;
    const int64_t request = std::min(round_up(bytes - done, unit), kRequestBytes);
    const int64_t count = file.read(static_cast<char*>(out) + done, request, offset + done);
    if (count == -EINTR || count == -EAGAIN) {
      if (++fruitless <= 1000) continue;
    }
    if (count < 0) {
      throw IoError("reading " + path + " at offset " + std::to_string(offset + done) +
                    " failed: " + describe(static_cast<int>(-count)));
    }
    bytes_read->fetch_add(count, std::memory_order_relaxed);
    const int64_t reached = done + count;
    if (reached >= bytes) return true;
    // A direct read continues from an aligned offset only: the odd end of a short one is read again.
    const int64_t next = round_down(reached, unit);
    if (next > done) {
      fruitless = 0;
    } else {
      const int64_t size = file.size();
      if (size >= 0 && size < offset + bytes) throw_ended_early(path, offset + bytes, size);
      if (++fruitless > kMaxFruitlessReads) {
        throw IoError("reading " + path + " at offset " + std::to_string(offset + done) + " returned " +
                      std::to_string(count) + " bytes " + std::to_string(fruitless) + " times: the disk is failing");
      }
    }
    done = next;
  }
  return true;
}

}  // namespace chainfed

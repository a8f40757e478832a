#include "store/page_buffer.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <system_error>
#include <utility>

#include "chainfed/error.h"
#include "store/file.h"

namespace chainfed {
namespace {

constexpr int64_t kHugePageBytes = int64_t{2} << 20;

void unmap(char* begin, const char* end) {
  if (begin < end) ::munmap(begin, static_cast<size_t>(end - begin));
}

}  // namespace

PageBuffer::~PageBuffer() {
  if (pinning_ != nullptr) pinning_->unpin(data_);
  unmap(data_, data_ + bytes_);
}

PageBuffer::PageBuffer(PageBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      huge_bytes_(std::exchange(other.huge_bytes_, 0)),
      pinning_(std::move(other.pinning_)) {}

// The mapping starts on a huge page and is cut to exactly the bytes asked for.
void PageBuffer::reserve(int64_t bytes, std::shared_ptr<const Pinning> pinning) {
  if (data_ != nullptr) return;
  bytes = round_up(bytes, ::sysconf(_SC_PAGESIZE));
  const int64_t mapped_bytes = bytes + kHugePageBytes;
  void* address = ::mmap(nullptr, static_cast<size_t>(mapped_bytes), PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) {
    throw IoError("cannot reserve " + std::to_string(bytes) +
                  " bytes for a slot of the layer store: " + std::system_category().message(errno));
  }
  char* const begin = static_cast<char*>(address);
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(begin) % kHugePageBytes);
  data_ = begin + (misaligned == 0 ? 0 : kHugePageBytes - misaligned);
  bytes_ = bytes;
  unmap(begin, data_);
  unmap(data_ + bytes_, begin + mapped_bytes);
  ::madvise(data_, static_cast<size_t>(bytes_), MADV_DONTFORK);
  ::madvise(data_, static_cast<size_t>(bytes_), MADV_NOHUGEPAGE);
  if (pinning == nullptr) return;
  shape_for(bytes_);
  try {
    pinning->pin(data_, bytes_);
  } catch (...) {
    unmap(data_, data_ + bytes_);
    data_ = nullptr;
    huge_bytes_ = 0;
    throw;
  }
  pinning_ = std::move(pinning);
}

// Only huge pages that lie wholly inside the file are asked for: a slot holds its file and no more. Tails are given
// back whole before their kind of page changes, so that no huge page stays for a part of it.
void PageBuffer::shape_for(int64_t bytes) {
  if (pinning_ != nullptr) return;  // the device would go on reading the pages that were given back
  const int64_t huge_bytes = round_down(std::min(bytes, bytes_), kHugePageBytes);
  const int64_t kept = huge_bytes == huge_bytes_ ? held_bytes(bytes) : std::min(huge_bytes, huge_bytes_);
  if (kept < bytes_) ::madvise(data_ + kept, static_cast<size_t>(bytes_ - kept), MADV_DONTNEED);
  if (huge_bytes > huge_bytes_) {
    ::madvise(data_ + huge_bytes_, static_cast<size_t>(huge_bytes - huge_bytes_), MADV_HUGEPAGE);
  } else if (huge_bytes < huge_bytes_) {
    ::madvise(data_ + huge_bytes, static_cast<size_t>(huge_bytes_ - huge_bytes), MADV_NOHUGEPAGE);
  }
  huge_bytes_ = huge_bytes;
}

int64_t PageBuffer::held_bytes(int64_t bytes) const {
  if (pinning_ != nullptr) return bytes_;
  return std::min(bytes_, round_up(bytes, ::sysconf(_SC_PAGESIZE)));
}

}  // namespace chainfed

#include "store/page_buffer.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>
#include <utility>

#include "chainfed/error.h"
#include "store/file.h"

namespace chainfed {

PageBuffer::~PageBuffer() {
  if (data_ != nullptr) ::munmap(data_, static_cast<size_t>(bytes_));
}

PageBuffer::PageBuffer(PageBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

void PageBuffer::reserve(int64_t bytes) {
  if (data_ != nullptr) return;
  void* address = ::mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) {
    throw IoError("cannot reserve " + std::to_string(bytes) +
                  " bytes for a slot of the layer store: " + std::system_category().message(errno));
  }
  ::madvise(address, static_cast<size_t>(bytes), MADV_DONTFORK);
  data_ = static_cast<char*>(address);
  bytes_ = bytes;
}

void PageBuffer::drop_tail(int64_t bytes) {
  const int64_t begin = round_up(bytes, ::sysconf(_SC_PAGESIZE));
  if (begin < bytes_) ::madvise(data_ + begin, static_cast<size_t>(bytes_ - begin), MADV_DONTNEED);
}

}  // namespace chainfed

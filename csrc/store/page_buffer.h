// Aligned memory that costs nothing until it is written and can give its tail back to the system. Huge pages where the
// system has them: a direct read names every piece of memory to the disk, and 2 MiB pieces read two to three times
// faster than 4 KiB ones. Not copied to the children of fork(): a direct read in flight during fork() may otherwise
// land in the child's copy of a page.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>

namespace chainfed {

// Page-locks memory for a device that reads it in place, and undoes it. Memory so held stays where it is and is kept
// whole.
struct Pinning {
  std::function<void(void* data, int64_t bytes)> pin;
  std::function<void(void* data)> unpin;
};

class PageBuffer {
 public:
  PageBuffer() = default;
  ~PageBuffer();
  PageBuffer(PageBuffer&& other) noexcept;
  PageBuffer& operator=(PageBuffer&& other) = delete;

  // Reserve `bytes` of address space on the first call; later calls keep what is there. With `pinning` the memory is
  // there at once and pinned until the end. Throws IoError, and what pin throws.
  void reserve(int64_t bytes, std::shared_ptr<const Pinning> pinning = nullptr);
  // Make ready for [0, bytes): huge pages where whole ones fit, ordinary pages for the rest; give back what lies
  // beyond. Pinned memory stays as it is.
  void shape_for(int64_t bytes);
  // Memory that [0, bytes) takes when written: whole pages; all of it when pinned.
  int64_t held_bytes(int64_t bytes) const;
  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
  int64_t huge_bytes_ = 0;                  // [0, huge_bytes_) may be on huge pages
  std::shared_ptr<const Pinning> pinning_;  // set while pinned
};

}  // namespace chainfed

// A disk in memory with faults on demand, put under the reader through FileOpener. A test keeps the `Disk` and changes
// it while the reader runs: errors and short reads are used up one a request; a closed gate holds every read.
#pragma once
#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "chainfed/store.h"
#include "store/file.h"

namespace chainfed::testing {

struct Disk {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<std::string, std::vector<char>> files;
  std::map<std::string, std::deque<int>> errors;           // errno of the next reads; 0: this one succeeds
  std::map<std::string, std::deque<int64_t>> short_reads;  // most bytes of the next reads
  std::map<std::string, int> num_reads;
  bool gate_open = true;
  int num_waiting = 0;
  bool direct = true;

  void set_gate(bool open) {
    std::lock_guard<std::mutex> lock(mutex);
    gate_open = open;
    changed.notify_all();
  }
  void wait_for_readers(int count) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return num_waiting >= count; });
  }
  void fail_next(const std::string& path, int error) {
    std::lock_guard<std::mutex> lock(mutex);
    errors[path].push_back(error);
  }
  int reads_of(const std::string& path) {
    std::lock_guard<std::mutex> lock(mutex);
    return num_reads[path];
  }
};

class FaultyFile final : public ReadFile {
 public:
  FaultyFile(std::shared_ptr<Disk> disk, std::string path) : disk_(std::move(disk)), path_(std::move(path)) {}

  int64_t size() const override {
    std::lock_guard<std::mutex> lock(disk_->mutex);
    return static_cast<int64_t>(disk_->files[path_].size());
  }
  bool direct() const override { return disk_->direct; }

  int64_t read(void* out, int64_t bytes, int64_t offset) override {
    std::unique_lock<std::mutex> lock(disk_->mutex);
    ++disk_->num_reads[path_];
    ++disk_->num_waiting;
    disk_->changed.notify_all();
    disk_->changed.wait(lock, [this] { return disk_->gate_open; });
    --disk_->num_waiting;
    if (disk_->direct && (bytes % kReadAlignment != 0 || offset % kReadAlignment != 0 ||
                          reinterpret_cast<uintptr_t>(out) % kReadAlignment != 0)) {
      return -EINVAL;
    }
    if (auto& errors = disk_->errors[path_]; !errors.empty()) {
      const int error = errors.front();
      errors.pop_front();
      if (error != 0) return -error;
    }
    const std::vector<char>& data = disk_->files[path_];
    int64_t count = std::min(bytes, std::max<int64_t>(0, static_cast<int64_t>(data.size()) - offset));
    if (auto& shorts = disk_->short_reads[path_]; !shorts.empty()) {
      count = std::min(count, shorts.front());
      shorts.pop_front();
    }
    std::memcpy(out, data.data() + offset, static_cast<size_t>(count));
    return count;
  }

 private:
  const std::shared_ptr<Disk> disk_;
  const std::string path_;
};

inline FileOpener opener(const std::shared_ptr<Disk>& disk) {
  return [disk](const std::string& path, bool) { return std::make_unique<FaultyFile>(disk, path); };
}

}  // namespace chainfed::testing

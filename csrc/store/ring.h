// The ring of slots behind a StoreReader: who holds which file, who waits, what is read next. Owned by the reader and
// by every lease (so that a lease's memory outlives a closed reader). Every function is thread-safe; one mutex guards
// all state and is never held during a read. Slots are named by their number.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "chainfed/store.h"
#include "store/file.h"
#include "store/page_buffer.h"

namespace chainfed {

// A read's error, kept as text so that every thread that waited throws an exception of its own.
struct ReadFailure {
  bool corrupt = false;  // CorruptFile, else IoError
  std::string message;
  [[noreturn]] void raise() const;
};

class Ring {
 public:
  // `files` are checked and `handles[i]` is open on files[i]. num_slots >= 1.
  // pinning: null, or how every slot is held in place for a device.
  Ring(std::vector<FileEntry> files, std::vector<std::unique_ptr<ReadFile>> handles, int num_slots,
       std::shared_ptr<const Pinning> pinning = nullptr);

  void check_file(int file) const;  // throws InvalidArgument when out of range or in a child made by fork()
  void prefetch(int file);
  int acquire(int file);      // a slot, pinned
  int try_acquire(int file);  // -1 unless resident
  // Lease bookkeeping: `released` belongs to the lease and changes under the ring's mutex only.
  bool pin_unless(int slot, const std::atomic<bool>& released);
  void unpin_once(int slot, std::atomic<bool>& released);

  void stop();  // ends the prefetch thread; called once, by the reader's destructor
  bool in_owner_process() const;
  ReaderStats stats() const;
  int64_t slot_bytes() const { return slot_bytes_; }
  const char* slot_data(int slot) const { return slots_[static_cast<size_t>(slot)].memory.data(); }
  const FileEntry& entry(int file) const { return files_[static_cast<size_t>(file)]; }
  ReadFile& handle(int file) const { return *handles_[static_cast<size_t>(file)]; }
  std::atomic<int64_t> bytes_read{0}, read_ns{0};

 private:
  enum class SlotState : uint8_t { empty, queued, reading, ready };
  // One read of one file into a slot; whoever waits for it holds a reference.
  struct Load {
    bool done = false;
    std::unique_ptr<ReadFailure> failure;
  };
  struct Slot {
    PageBuffer memory;
    SlotState state = SlotState::empty;
    int file = -1;
    int num_pins = 0;
    bool prefetched_unused = false;
    uint64_t last_used = 0;
    int64_t held_bytes = 0;
    std::shared_ptr<Load> load;
  };
  using Lock = std::unique_lock<std::mutex>;

  int pin_resident(int file);
  int wait_for_load(Lock& lock, int slot_number);
  int claim_slot(int file);
  int choose_victim(bool for_prefetch) const;
  void assign(int slot_number, int file);
  void read_into(Lock& lock, int slot_number);
  std::unique_ptr<ReadFailure> read_file(PageBuffer& memory, int file);
  bool a_slot_will_be_free() const;
  [[noreturn]] void throw_all_pinned(int file) const;
  void start_thread();
  void prefetch_loop();
  Slot& slot(int number) { return slots_[static_cast<size_t>(number)]; }

  const std::vector<FileEntry> files_;
  const std::vector<std::unique_ptr<ReadFile>> handles_;
  const int64_t slot_bytes_;
  const int owner_process_;
  const std::shared_ptr<const Pinning> pinning_;

  mutable std::mutex mutex_;
  std::condition_variable work_;     // the queue got an entry, or stop
  std::condition_variable changed_;  // a read ended or a pin was dropped
  std::vector<Slot> slots_;
  std::vector<int> slot_of_file_;                                  // -1: in no slot
  std::vector<std::unique_ptr<ReadFailure>> failure_of_prefetch_;  // until acquire() throws it
  std::deque<int> queue_;                                          // slots to read, in order
  int newest_prefetch_ = -1;                                       // file, until it is acquired
  uint64_t clock_ = 0;
  int64_t num_hits_ = 0, num_misses_ = 0, stall_ns_ = 0;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace chainfed

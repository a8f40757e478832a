#include "store/ring.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "chainfed/error.h"

namespace chainfed {
namespace {

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int64_t largest_file_bytes(const std::vector<FileEntry>& files) {
  int64_t largest = 0;
  for (const FileEntry& entry : files) largest = std::max(largest, entry.file_bytes);
  return std::max(round_up(largest, kReadAlignment), kReadAlignment);
}

// Adds the time of its life to a counter that the ring's mutex guards; destroyed before the lock is.
class StallTimer {
 public:
  explicit StallTimer(int64_t* total_ns) : total_ns_(total_ns), start_ns_(now_ns()) {}
  ~StallTimer() { *total_ns_ += now_ns() - start_ns_; }

 private:
  int64_t* const total_ns_;
  const int64_t start_ns_;
};

}  // namespace

void ReadFailure::raise() const {
  if (corrupt) throw CorruptFile(message);
  throw IoError(message);
}

Ring::Ring(std::vector<FileEntry> files, std::vector<std::unique_ptr<ReadFile>> handles, int num_slots,
           std::shared_ptr<const Pinning> pinning)
    : files_(std::move(files)),
      handles_(std::move(handles)),
      slot_bytes_(largest_file_bytes(files_)),
      owner_process_(::getpid()),
      pinning_(std::move(pinning)),
      slots_(static_cast<size_t>(num_slots)),
      slot_of_file_(files_.size(), -1),
      failure_of_prefetch_(files_.size()) {}

bool Ring::in_owner_process() const { return ::getpid() == owner_process_; }

void Ring::check_file(int file) const {
  if (!in_owner_process()) {
    throw InvalidArgument("this StoreReader was opened before fork(); open a new one in the child process");
  }
  if (file < 0 || static_cast<size_t>(file) >= files_.size()) {
    throw InvalidArgument("file " + std::to_string(file) + " is not in the store: expected 0 to " +
                          std::to_string(files_.size() - 1));
  }
}

void Ring::prefetch(int file) {
  check_file(file);
  std::lock_guard<std::mutex> lock(mutex_);
  int number = slot_of_file_[static_cast<size_t>(file)];
  if (number < 0) {
    number = choose_victim(/*for_prefetch=*/true);
    if (number < 0) return;
    if (!thread_.joinable()) start_thread();
    failure_of_prefetch_[static_cast<size_t>(file)].reset();
    assign(number, file);
    slot(number).state = SlotState::queued;
    queue_.push_back(number);
    work_.notify_one();
  }
  slot(number).last_used = ++clock_;
  slot(number).prefetched_unused = true;
  newest_prefetch_ = file;
}

int Ring::try_acquire(int file) {
  check_file(file);
  std::lock_guard<std::mutex> lock(mutex_);
  const int number = pin_resident(file);
  if (number >= 0) ++num_hits_;
  return number;
}

int Ring::acquire(int file) {
  check_file(file);
  Lock lock(mutex_);
  if (const int number = pin_resident(file); number >= 0) {
    ++num_hits_;
    return number;
  }
  ++num_misses_;
  StallTimer timer(&stall_ns_);
  while (true) {
    if (const int number = pin_resident(file); number >= 0) return number;
    if (auto failure = std::move(failure_of_prefetch_[static_cast<size_t>(file)])) failure->raise();
    const int current = slot_of_file_[static_cast<size_t>(file)];
    if (current >= 0 && slot(current).state == SlotState::reading) return wait_for_load(lock, current);
    const int number = claim_slot(file);
    if (number >= 0) {
      read_into(lock, number);
      return wait_for_load(lock, number);
    }
    if (!a_slot_will_be_free()) throw_all_pinned(file);
    changed_.wait(lock);
  }
}

// Pin the file's slot if its bytes are there.
int Ring::pin_resident(int file) {
  const int number = slot_of_file_[static_cast<size_t>(file)];
  if (number < 0 || slot(number).state != SlotState::ready) return -1;
  Slot& found = slot(number);
  ++found.num_pins;
  found.last_used = ++clock_;
  found.prefetched_unused = false;
  if (newest_prefetch_ == file) newest_prefetch_ = -1;
  return number;
}

// Pin the slot until its read has ended; the pin stays if the read succeeded.
int Ring::wait_for_load(Lock& lock, int slot_number) {
  Slot& reading = slot(slot_number);
  const std::shared_ptr<Load> load = reading.load;
  const int file = reading.file;
  ++reading.num_pins;
  changed_.wait(lock, [&] { return load->done; });
  --reading.num_pins;
  if (load->failure != nullptr) {
    changed_.notify_all();
    load->failure->raise();
  }
  return pin_resident(file);
}

// A slot that this thread may read `file` into: the one queued for it, or a victim. -1: none.
int Ring::claim_slot(int file) {
  int number = slot_of_file_[static_cast<size_t>(file)];
  if (number < 0) {
    number = choose_victim(/*for_prefetch=*/false);
    if (number < 0) return -1;
    assign(number, file);
  }
  queue_.erase(std::remove(queue_.begin(), queue_.end(), number), queue_.end());
  return number;
}

// Least recently used of the unpinned slots, empty ones first. A prefetch takes nothing that was prefetched and not yet
// used; acquire() takes the newest prefetch, then what is only queued, when there is nothing else.
int Ring::choose_victim(bool for_prefetch) const {
  int best = -1;
  auto rank = [&](const Slot& s) {
    if (s.state == SlotState::empty) return s.memory.data() != nullptr ? 0 : 1;
    if (s.state == SlotState::queued) return 4;
    return s.file == newest_prefetch_ ? 3 : 2;
  };
  for (size_t i = 0; i < slots_.size(); ++i) {
    const Slot& candidate = slots_[i];
    if (candidate.num_pins > 0 || candidate.state == SlotState::reading) continue;
    if (for_prefetch && (candidate.prefetched_unused || candidate.state == SlotState::queued)) continue;
    if (best < 0) {
      best = static_cast<int>(i);
      continue;
    }
    const Slot& chosen = slots_[static_cast<size_t>(best)];
    const int candidate_rank = rank(candidate), chosen_rank = rank(chosen);
    if (candidate_rank < chosen_rank || (candidate_rank == chosen_rank && candidate.last_used < chosen.last_used)) {
      best = static_cast<int>(i);
    }
  }
  return best;
}

// Give a slot to a file; what it held is no longer resident.
void Ring::assign(int slot_number, int file) {
  Slot& taken = slot(slot_number);
  taken.memory.reserve(slot_bytes_, pinning_);
  if (taken.file >= 0) slot_of_file_[static_cast<size_t>(taken.file)] = -1;
  taken.file = file;
  taken.state = SlotState::empty;
  taken.prefetched_unused = false;
  slot_of_file_[static_cast<size_t>(file)] = slot_number;
}

// Read the slot's file with the mutex released; afterwards the slot is ready, or empty with the failure in its load.
void Ring::read_into(Lock& lock, int slot_number) {
  Slot& target = slot(slot_number);
  const int file = target.file;
  const auto load = std::make_shared<Load>();
  const int64_t file_bytes = target.memory.held_bytes(entry(file).file_bytes);
  target.state = SlotState::reading;
  target.load = load;
  target.held_bytes = std::max(target.held_bytes, file_bytes);
  lock.unlock();
  auto failure = read_file(target.memory, file);
  lock.lock();
  target.held_bytes = file_bytes;
  if (failure == nullptr) {
    target.state = SlotState::ready;
    target.last_used = ++clock_;
  } else {
    target.state = SlotState::empty;
    target.prefetched_unused = false;
    target.file = -1;
    slot_of_file_[static_cast<size_t>(file)] = -1;
    if (newest_prefetch_ == file) newest_prefetch_ = -1;
  }
  load->failure = std::move(failure);
  load->done = true;
  changed_.notify_all();
}

std::unique_ptr<ReadFailure> Ring::read_file(PageBuffer& memory, int file) {
  const FileEntry& wanted = entry(file);
  const int64_t start_ns = now_ns();
  auto failure = std::make_unique<ReadFailure>();
  try {
    memory.shape_for(wanted.file_bytes);
    if (read_exact(handle(file), wanted.path, memory.data(), wanted.file_bytes, 0, &stop_, &bytes_read)) {
      failure.reset();
    } else {
      failure->message = "the reader was closed while it read " + wanted.path;
    }
  } catch (const CorruptFile& error) {
    failure->corrupt = true;
    failure->message = error.what();
  } catch (const std::exception& error) {
    failure->message = error.what();
  }
  read_ns.fetch_add(now_ns() - start_ns, std::memory_order_relaxed);
  return failure;
}

// A read that nobody waits for will end, and who waited for a failed read will leave its slot: worth waiting for.
bool Ring::a_slot_will_be_free() const {
  return std::any_of(slots_.begin(), slots_.end(), [](const Slot& s) {
    return s.state == SlotState::empty || (s.state == SlotState::reading && s.num_pins == 0);
  });
}

void Ring::throw_all_pinned(int file) const {
  std::string pinned;
  for (const Slot& s : slots_) {
    if (s.file >= 0) pinned += (pinned.empty() ? "" : ", ") + files_[static_cast<size_t>(s.file)].path;
  }
  throw InvalidArgument("no free slot for " + entry(file).path + ": all " + std::to_string(slots_.size()) +
                        " slots are pinned (" + pinned + "); release a lease first or open the reader with more slots");
}

bool Ring::pin_unless(int slot_number, const std::atomic<bool>& released) {
  if (!in_owner_process()) return false;
  std::lock_guard<std::mutex> lock(mutex_);
  if (released.load(std::memory_order_relaxed)) return false;
  ++slot(slot_number).num_pins;
  return true;
}

void Ring::unpin_once(int slot_number, std::atomic<bool>& released) {
  if (!in_owner_process()) {
    released.store(true);
    return;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (released.exchange(true)) return;
  Slot& freed = slot(slot_number);
  --freed.num_pins;
  freed.last_used = ++clock_;
  changed_.notify_all();
}

// Signals go to the program's own threads: this one must not be interrupted in the middle of a read.
void Ring::start_thread() {
  sigset_t all_signals, previous;
  ::sigfillset(&all_signals);
  ::pthread_sigmask(SIG_SETMASK, &all_signals, &previous);
  try {
    thread_ = std::thread([this] { prefetch_loop(); });
  } catch (...) {
    ::pthread_sigmask(SIG_SETMASK, &previous, nullptr);
    throw IoError("cannot start the prefetch thread of the layer store: the system refuses more threads");
  }
  ::pthread_sigmask(SIG_SETMASK, &previous, nullptr);
}

void Ring::prefetch_loop() {
  Lock lock(mutex_);
  while (true) {
    work_.wait(lock, [this] { return stop_.load() || !queue_.empty(); });
    if (stop_.load()) return;
    const int number = queue_.front();
    queue_.pop_front();
    const int file = slot(number).file;
    read_into(lock, number);
    const std::shared_ptr<Load> load = slot(number).load;
    const bool nobody_waited = slot(number).num_pins == 0;
    if (load->failure != nullptr && nobody_waited) {
      failure_of_prefetch_[static_cast<size_t>(file)] = std::make_unique<ReadFailure>(*load->failure);
    }
  }
}

void Ring::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_.store(true);
    work_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

ReaderStats Ring::stats() const {
  if (!in_owner_process()) check_file(0);
  std::lock_guard<std::mutex> lock(mutex_);
  ReaderStats result{};
  result.bytes_read = bytes_read.load();
  result.read_ns = read_ns.load();
  result.stall_ns = stall_ns_;
  result.hits = num_hits_;
  result.misses = num_misses_;
  for (const Slot& s : slots_) result.resident_bytes += s.held_bytes;
  return result;
}

}  // namespace chainfed

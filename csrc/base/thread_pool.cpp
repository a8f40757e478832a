#include "base/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "chainfed/error.h"

namespace chainfed {
namespace {

constexpr int kMaxThreads = 256;
// About 20 µs: longer than the gap between two kernels of a layer, far shorter than anybody would notice.
constexpr int kSpinRounds = 400;

thread_local bool inside_body = false;

inline void pause() {
#if defined(CHAINFED_X86)
  __builtin_ia32_pause();
#elif defined(CHAINFED_ARM64)
  __asm__ volatile("yield");
#endif
}

// Chunks a thread, when all threads run equally fast. One that is late or preempted then delays the call by a small
// part of its share, and the others take over the rest.
constexpr int64_t kChunksPerThread = 8;

class Pool {
 public:
  explicit Pool(int count) {
    workers_.reserve(count - 1);
    try {
      for (int thread = 1; thread < count; ++thread) workers_.emplace_back([this, thread] { work(thread); });
    } catch (...) {
      stop();
      throw;
    }
  }
  ~Pool() { stop(); }

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  void run(int64_t count, detail::RangeBody body, void* context) {
    const int64_t num_chunks = std::min(count, kChunksPerThread * num_threads());
    ticket_.fetch_or(kClosed, std::memory_order_acq_rel);
    count_.store(count, std::memory_order_release);
    num_chunks_.store(num_chunks, std::memory_order_release);
    body_.store(body, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    num_finished_.store(0, std::memory_order_relaxed);
    const uint32_t job = next_job(0);
    take_chunks(job, 0);
    // Only chunks in the hands of other threads are waited for: a worker that has not woken up holds none.
    wait_for([&] { return num_finished_.load(std::memory_order_acquire) == num_chunks; }, done_);
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  // The ticket holds the job's number and its next chunk; a chunk of all ones: nothing to take.
  static constexpr uint64_t kClosed = 0xFFFFFFFFu;

  static uint32_t job_of(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }

  uint32_t next_job(uint64_t first_chunk) {
    uint32_t job;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job = job_of(ticket_.load(std::memory_order_relaxed)) + 1;
      ticket_.store(static_cast<uint64_t>(job) << 32 | first_chunk, std::memory_order_release);
    }
    wake_.notify_all();
    return job;
  }

  // The ticket is closed before the fields change, and fields are read by acquire: whoever has seen a field of the next
  // job fails to exchange the ticket of this one.
  void take_chunks(uint32_t job, int thread) {
    for (;;) {
      uint64_t ticket = ticket_.load(std::memory_order_acquire);
      const auto chunk = static_cast<int64_t>(ticket & kClosed);
      const int64_t count = count_.load(std::memory_order_acquire);
      const int64_t num_chunks = num_chunks_.load(std::memory_order_acquire);
      const detail::RangeBody body = body_.load(std::memory_order_acquire);
      void* context = context_.load(std::memory_order_acquire);
      if (job_of(ticket) != job || chunk >= num_chunks) return;
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      inside_body = true;
      try {
        body(context, split(count, num_chunks, chunk), split(count, num_chunks, chunk + 1), thread);
      } catch (...) {
        keep_error(chunk);
      }
      inside_body = false;
      if (num_finished_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_chunks) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
    }
  }

  static int64_t split(int64_t count, int64_t num_chunks, int64_t chunk) {
    return count / num_chunks * chunk + std::min(chunk, count % num_chunks);
  }

  void keep_error(int64_t chunk) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (error_ && error_chunk_ < chunk) return;
    error_ = std::current_exception();
    error_chunk_ = chunk;
  }

  template <typename Ready>
  void wait_for(Ready ready, std::condition_variable& signal) {
    for (int i = 0; i < kSpinRounds; ++i) {
      if (ready()) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    signal.wait(lock, ready);
  }

  void work(int thread) {
    uint32_t seen = 0;
    for (;;) {
      wait_for([&] { return job_of(ticket_.load(std::memory_order_acquire)) != seen; }, wake_);
      // In this order: the last job's number, once seen, is never waited for again.
      seen = job_of(ticket_.load(std::memory_order_acquire));
      if (stopping_.load(std::memory_order_acquire)) return;
      take_chunks(seen, thread);
    }
  }

  void stop() {
    stopping_.store(true, std::memory_order_release);
    next_job(kClosed);
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int64_t> count_{0}, num_chunks_{0}, num_finished_{0};
  std::atomic<detail::RangeBody> body_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<bool> stopping_{false};
  std::exception_ptr error_;  // of the lowest chunk that failed; guarded by mutex_ while a job runs
  int64_t error_chunk_ = 0;
  std::vector<std::thread> workers_;
};

int default_num_threads() {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) return std::clamp(CPU_COUNT(&cpus), 1, kMaxThreads);
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMaxThreads);
}

// turn guards pool and is held for a whole parallel call. Leaked on purpose: a worker may outlive static objects.
struct Runtime {
  std::mutex turn;
  std::unique_ptr<Pool> pool;
  std::atomic<int> wanted{default_num_threads()};
};

Runtime* runtime_in_process = nullptr;

Runtime& runtime() {
  static const bool made = [] {
    runtime_in_process = new Runtime;
    // fork() copies only the calling thread. Taking the turn before it means that no job is under way in the
    // child; the child forgets the parent's pool (whose threads do not exist there) and builds its own.
    pthread_atfork([] { runtime_in_process->turn.lock(); }, [] { runtime_in_process->turn.unlock(); },
                   [] {
                     const int wanted = runtime_in_process->wanted.load();
                     runtime_in_process = new Runtime;
                     runtime_in_process->wanted.store(wanted);
                   });
    return true;
  }();
  (void)made;
  return *runtime_in_process;
}

}  // namespace

int num_threads() { return runtime().wanted.load(std::memory_order_relaxed); }

void set_num_threads(int count) {
  if (count < 1 || count > kMaxThreads) {
    throw InvalidArgument("set_num_threads: count must be 1.." + std::to_string(kMaxThreads) + ", got " +
                          std::to_string(count));
  }
  runtime().wanted.store(count, std::memory_order_relaxed);
}

namespace detail {

void run_ranges(int64_t count, RangeBody body, void* context) {
  if (count <= 0) return;
  if (inside_body || count == 1 || num_threads() == 1) {
    body(context, 0, count, 0);
    return;
  }
  Runtime& shared = runtime();
  std::lock_guard<std::mutex> turn(shared.turn);
  const int wanted = shared.wanted.load(std::memory_order_relaxed);
  if (!shared.pool || shared.pool->num_threads() != wanted) {
    shared.pool.reset();
    shared.pool = std::make_unique<Pool>(wanted);
  }
  shared.pool->run(count, body, context);
}

}  // namespace detail
}  // namespace chainfed

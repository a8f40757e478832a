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
#include <vector>

#include "chainfed/error.h"

namespace chainfed {
namespace {

constexpr int kMaxThreads = 256;
// About 20 µs: longer than the gap between two kernels of a layer, far shorter than anybody would notice.
constexpr int kSpinRounds = 400;

thread_local bool inside_body = false;

inline void pause() {
#ifdef CHAINFED_X86
  __builtin_ia32_pause();
#endif
}

struct Job {
  detail::RangeBody body = nullptr;
  void* context = nullptr;
  int64_t count = 0;
  int num_parts = 1;
  std::vector<std::exception_ptr> errors;
};

void run_part(Job& job, int part) {
  const int64_t begin = job.count * part / job.num_parts;
  const int64_t end = job.count * (part + 1) / job.num_parts;
  if (begin == end) return;
  inside_body = true;
  try {
    job.body(job.context, begin, end, part);
  } catch (...) {
    job.errors[part] = std::current_exception();
  }
  inside_body = false;
}

class Pool {
 public:
  explicit Pool(int count) {
    workers_.reserve(count - 1);
    try {
      for (int part = 1; part < count; ++part) workers_.emplace_back([this, part] { work(part); });
    } catch (...) {
      stop();
      throw;
    }
  }
  ~Pool() { stop(); }

  int num_parts() const { return static_cast<int>(workers_.size()) + 1; }

  void run(Job& job) {
    job_ = &job;
    unfinished_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    run_part(job, 0);
    wait_for([this] { return unfinished_.load(std::memory_order_acquire) == 0; }, done_);
  }

 private:
  template <typename Ready>
  void wait_for(Ready ready, std::condition_variable& signal) {
    for (int i = 0; i < kSpinRounds; ++i) {
      if (ready()) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    signal.wait(lock, ready);
  }

  void work(int part) {
    uint64_t seen = 0;
    for (;;) {
      wait_for([&] { return generation_.load(std::memory_order_acquire) != seen; }, wake_);
      ++seen;
      if (stopping_) return;
      run_part(*job_, part);
      if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
    }
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> unfinished_{0};
  bool stopping_ = false;  // written under mutex_ before the generation is raised
  Job* job_ = nullptr;     // written before the generation is raised
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
  if (!shared.pool || shared.pool->num_parts() != wanted) {
    shared.pool.reset();
    shared.pool = std::make_unique<Pool>(wanted);
  }
  Job job;
  job.body = body;
  job.context = context;
  job.count = count;
  job.num_parts = shared.pool->num_parts();
  job.errors.resize(job.num_parts);
  shared.pool->run(job);
  for (const std::exception_ptr& error : job.errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace detail
}  // namespace chainfed

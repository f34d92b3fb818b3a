#include "qtale/parallel.h"

#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "core/text.h"

namespace qtale {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kSpins = 4000;         // some tens of microseconds: the gap between two layers of one model
constexpr std::int64_t kChunks = 4;  // ranges per thread, so that a thread the host delays does not hold up the rest
thread_local bool inside_range = false;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

int available_cpus() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

int initial_threads() {
  if (const char* text = std::getenv("QTALE_NUM_THREADS")) {
    char* end = nullptr;
    const long count = std::strtol(text, &end, 10);
    if (end == text || *end != '\0' || count < 1 || count > kMaxThreads)
      fail_input("QTALE_NUM_THREADS: '{}' is not a number of threads; use 1 to {}.", text, kMaxThreads);
    return static_cast<int>(count);
  }
  return available_cpus();
}

struct Job {
  detail::RangeFn fn;
  void* context;
  std::int64_t size;
  std::int64_t chunk;
  std::atomic<std::int64_t> next{0};
  std::mutex error_mutex;
  std::exception_ptr error;

  void work() {
    inside_range = true;
    for (;;) {
      const std::int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
      if (begin >= size) break;
      try {
        fn(context, begin, std::min(begin + chunk, size));
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
        next.store(size, std::memory_order_relaxed);
      }
    }
    inside_range = false;
  }
};

class Pool {
 public:
  explicit Pool(int threads) : owner_(getpid()) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { loop(); });
  }

  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }
  bool owned_by_this_process() const { return owner_ == getpid(); }

  void run(Job& job) {
    {
      const std::lock_guard lock(mutex_);
      job_ = &job;
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (sleepers_.load(std::memory_order_acquire) > 0) wake_.notify_all();
    job.work();
    {
      const std::lock_guard lock(mutex_);
      job_ = nullptr;  // a worker that wakes up only now finds nothing to join and holds nobody up
    }
    for (int spin = 0; active_.load(std::memory_order_acquire) != 0; ++spin) {
      if (spin < kSpins) {
        relax();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  void loop() {
    std::uint64_t seen = 0;
    for (;;) {
      seen = wait_for_generation(seen);
      Job* job = nullptr;
      {
        const std::lock_guard lock(mutex_);
        if (stop_) return;
        job = job_;
        if (job != nullptr) active_.fetch_add(1, std::memory_order_relaxed);
      }
      if (job == nullptr) continue;
      job->work();
      active_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::uint64_t wait_for_generation(std::uint64_t seen) {
    for (int spin = 0; spin < kSpins; ++spin) {
      const std::uint64_t now = generation_.load(std::memory_order_acquire);
      if (now != seen) return now;
      relax();
    }
    std::unique_lock lock(mutex_);
    sleepers_.fetch_add(1, std::memory_order_acq_rel);
    wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
    sleepers_.fetch_sub(1, std::memory_order_acq_rel);
    return generation_.load(std::memory_order_acquire);
  }

  const pid_t owner_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<int> active_{0};
  std::atomic<int> sleepers_{0};
  bool stop_ = false;
  Job* job_ = nullptr;
  std::vector<std::thread> workers_;
};

std::mutex& pool_mutex() {
  static std::mutex mutex;
  return mutex;
}

std::atomic<int>& configured_threads() {
  static std::atomic<int> count{initial_threads()};
  return count;
}

// The pool for the configured thread count; call with pool_mutex held. Never destroyed at exit: in a forked child
// its workers do not exist, and joining them would hang.
Pool& pool() {
  static Pool* instance = nullptr;
  const int wanted = configured_threads();
  if (instance != nullptr && !instance->owned_by_this_process()) instance = nullptr;
  if (instance != nullptr && instance->threads() != wanted) {
    delete instance;
    instance = nullptr;
  }
  if (instance == nullptr) instance = new Pool(wanted);
  return *instance;
}

}  // namespace

int num_threads() { return configured_threads(); }

void set_num_threads(int count) {
  if (count < 1 || count > kMaxThreads)
    fail_input("set_num_threads: {} is not a number of threads; use 1 to {}.", count, kMaxThreads);
  configured_threads() = count;
}

void detail::parallel_ranges(std::int64_t size, std::int64_t grain, RangeFn fn, void* context) {
  if (size <= 0) return;
  grain = std::max<std::int64_t>(grain, 1);
  if (size <= grain || inside_range || num_threads() == 1) return fn(context, 0, size);
  const std::unique_lock lock(pool_mutex(), std::try_to_lock);
  if (!lock) return fn(context, 0, size);
  Pool& workers = pool();
  const std::int64_t share = (size + workers.threads() * kChunks - 1) / (workers.threads() * kChunks);
  Job job{fn, context, size, std::max(grain, share), {}, {}, {}};
  workers.run(job);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace qtale

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
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/shares.h"
#include "core/text.h"

namespace qtale {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kSpins = 4000;  // some tens of microseconds: the gap between two layers of one model
thread_local bool inside_range = false;
thread_local int thread_limit = 0;  // 0: none of its own

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
  Cut cut;
  std::span<const Upcoming> upcoming;
  std::span<Share> shares;  // of each thread
  std::mutex error_mutex;
  std::exception_ptr error;

  // Call before the threads work.
  void deal() {
    for (std::size_t t = 0; t < shares.size(); ++t)
      shares[t].set(cut.begin_of(static_cast<std::int64_t>(t)), cut.begin_of(static_cast<std::int64_t>(t) + 1));
  }

  void work(std::size_t thread) {
    inside_range = true;
    for (std::size_t i = 0; i < shares.size(); ++i) {
      Share& share = shares[(thread + i) % shares.size()];
      while (const auto range = share.take(i == 0)) run(*range);
    }
    inside_range = false;
  }

 private:
  void run(const Share::Range& range) {
    try {
      fn(context, range.begin * cut.grain, std::min(size, range.end * cut.grain));
    } catch (...) {
      const std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
      for (Share& share : shares) share.set(0, 0);
    }
  }
};

// Workers live until the process ends: a call takes as many of them as it may use, the others sleep on.
class Pool {
 public:
  Pool() : owner_(getpid()) {}
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  bool owned_by_this_process() const { return owner_ == getpid(); }

  // On the caller and threads - 1 workers.
  void run(Job& job, int threads) {
    const auto helpers = static_cast<std::size_t>(threads - 1);
    while (workers_.size() < helpers) workers_.push_back(std::make_unique<Worker>(*this, workers_.size() + 1));
    if (shares_.size() <= helpers) shares_ = std::vector<Share>(helpers + 1);
    job.shares = std::span(shares_).first(helpers + 1);
    job.deal();
    if (!job.upcoming.empty()) ahead_ = Ahead(job.upcoming[0]);
    {
      const std::lock_guard lock(mutex_);
      for (std::size_t i = 0; i < helpers; ++i) workers_[i]->give(&job);
    }
    for (std::size_t i = 0; i < helpers; ++i) workers_[i]->wake();
    job.work(0);
    {
      const std::lock_guard lock(mutex_);
      // A worker that wakes up only now finds nothing to join and holds nobody up.
      for (std::size_t i = 0; i < helpers; ++i) workers_[i]->take_back();
    }
    for (int spin = 0; active_.load(std::memory_order_acquire) != 0; ++spin) {
      if (ahead_.step()) continue;
      if (spin < kSpins) {
        relax();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  class alignas(64) Worker {
   public:
    Worker(Pool& pool, std::size_t thread) : pool_(pool), thread_(thread) {
      std::thread([this] { loop(); }).detach();
    }

    // These two with the pool's mutex held.
    void give(Job* job) {
      job_ = job;
      calls_.fetch_add(1, std::memory_order_release);
    }
    void take_back() { job_ = nullptr; }

    void wake() {
      if (asleep_.load(std::memory_order_acquire)) wake_.notify_one();
    }

   private:
    [[noreturn]] void loop() {
      for (std::uint64_t seen = 0;;) {
        seen = wait_for_call(seen);
        Job* job = nullptr;
        {
          const std::lock_guard lock(pool_.mutex_);
          job = job_;
          if (job != nullptr) pool_.active_.fetch_add(1, std::memory_order_relaxed);
        }
        if (job == nullptr) continue;
        if (thread_ < job->upcoming.size()) ahead_ = Ahead(job->upcoming[thread_]);
        job->work(thread_);
        pool_.active_.fetch_sub(1, std::memory_order_release);
      }
    }

    std::uint64_t wait_for_call(std::uint64_t seen) {
      for (int spin = 0; spin < kSpins; ++spin) {
        const std::uint64_t now = calls_.load(std::memory_order_acquire);
        if (now != seen) return now;
        if (!ahead_.step()) relax();
      }
      std::unique_lock lock(pool_.mutex_);
      asleep_.store(true, std::memory_order_release);
      wake_.wait(lock, [&] { return calls_.load(std::memory_order_acquire) != seen; });
      asleep_.store(false, std::memory_order_release);
      return calls_.load(std::memory_order_acquire);
    }

    Pool& pool_;
    const std::size_t thread_;  // the caller is 0
    Ahead ahead_;               // its own thread's alone
    std::atomic<std::uint64_t> calls_{0};
    std::atomic<bool> asleep_{false};
    Job* job_ = nullptr;
    std::condition_variable wake_;
  };

  const pid_t owner_;
  std::mutex mutex_;
  std::atomic<int> active_{0};
  Ahead ahead_;  // of the caller
  std::vector<Share> shares_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

std::mutex& pool_mutex() {
  static std::mutex mutex;
  return mutex;
}

std::atomic<int>& configured_threads() {
  static std::atomic<int> count{initial_threads()};
  return count;
}

// Call with pool_mutex held. Never destroyed: at exit nobody waits for workers, and in a forked child, which gets a
// pool of its own, they do not exist.
Pool& pool() {
  static Pool* instance = nullptr;
  if (instance == nullptr || !instance->owned_by_this_process()) instance = new Pool();
  return *instance;
}

}  // namespace

int num_threads() { return thread_limit > 0 ? thread_limit : configured_threads().load(); }

void set_num_threads(int count) {
  if (count < 1 || count > kMaxThreads)
    fail_input("set_num_threads: {} is not a number of threads; use 1 to {}.", count, kMaxThreads);
  configured_threads() = count;
}

ThreadLimit::ThreadLimit(int count) : before_(thread_limit) {
  if (count < 0 || count > kMaxThreads)
    fail_input("ThreadLimit: {} is not a number of threads; use 1 to {}, or 0 for no limit.", count, kMaxThreads);
  if (count > 0) thread_limit = count;
}

ThreadLimit::~ThreadLimit() { thread_limit = before_; }

std::int64_t begin_of_thread(std::int64_t size, std::int64_t grain, int thread) {
  const Cut cut(size, grain, num_threads());
  return std::min(size, cut.begin_of(thread) * cut.grain);
}

void detail::parallel_ranges(std::int64_t size, std::int64_t grain, RangeFn fn, void* context,
                             std::span<const Upcoming> next) {
  if (size <= 0) return;
  const int threads = num_threads();
  if (size <= std::max<std::int64_t>(grain, 1) || inside_range || threads == 1) return fn(context, 0, size);
  const std::unique_lock lock(pool_mutex(), std::try_to_lock);
  if (!lock) return fn(context, 0, size);
  Job job{fn, context, size, Cut(size, grain, threads), next, {}, {}, {}};
  pool().run(job, threads);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace qtale

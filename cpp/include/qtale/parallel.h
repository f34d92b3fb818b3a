// A small persistent thread pool of our own: two OpenMP runtimes beside torch give stalls and wrong results.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

namespace qtale {

// Threads that parallel_for uses, the caller included. Starts at QTALE_NUM_THREADS or the CPUs this process may run on.
int num_threads();
void set_num_threads(int count);

// Gives the calling thread a number of its own until the end of the scope: num_threads() returns it, and parallel_for
// uses as many, also where the process has fewer. 0 leaves things as they are.
class ThreadLimit {
 public:
  explicit ThreadLimit(int count);
  ~ThreadLimit();
  ThreadLimit(const ThreadLimit&) = delete;
  ThreadLimit& operator=(const ThreadLimit&) = delete;

 private:
  int before_;
};

// Memory that a thread will read first in a later call: it brings it near while it waits. It may be gone by then.
struct Upcoming {
  const std::byte* data = nullptr;
  std::int64_t bytes = 0;
};

// Where a thread begins in parallel_for(size, grain) if it comes in time, to go on from there; the caller is thread 0.
std::int64_t begin_of_thread(std::int64_t size, std::int64_t grain, int thread);

namespace detail {
using RangeFn = void (*)(void* context, std::int64_t begin, std::int64_t end);
void parallel_ranges(std::int64_t size, std::int64_t grain, RangeFn fn, void* context, std::span<const Upcoming> next);
}  // namespace detail

// Calls fn(begin, end) on disjoint ranges that cover [0, size), each at least `grain` long but for the last one.
// Runs on the caller alone when another thread already uses the pool or when called from inside a range.
// The first exception of a range is rethrown to the caller.
// next: what each thread, the caller first, will read in one of the calls to come.
template <class Fn>
void parallel_for(std::int64_t size, std::int64_t grain, Fn&& fn, std::span<const Upcoming> next = {}) {
  auto call = [](void* context, std::int64_t begin, std::int64_t end) {
    (*static_cast<std::remove_reference_t<Fn>*>(context))(begin, end);
  };
  detail::parallel_ranges(size, grain, call, const_cast<void*>(static_cast<const void*>(&fn)), next);
}

}  // namespace qtale

// The thread pool: ranges, exceptions, nesting, concurrent callers, resizing and forks.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>

#include "catch.h"
#include "support.h"

namespace qtale::test {
namespace {

using Range = std::pair<std::int64_t, std::int64_t>;

std::vector<Range> ranges_of(std::int64_t size, std::int64_t grain) {
  std::mutex mutex;
  std::vector<Range> out;
  parallel_for(size, grain, [&](std::int64_t begin, std::int64_t end) {
    const std::lock_guard lock(mutex);
    out.emplace_back(begin, end);
  });
  std::sort(out.begin(), out.end());
  return out;
}

std::int64_t parallel_sum(std::int64_t size) {
  std::atomic<std::int64_t> sum{0};
  parallel_for(size, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) sum += i;
  });
  return sum;
}

// The threads that take part in a call; its first ranges wait until so many have come.
std::set<std::thread::id> threads_of(std::int64_t size, int expected) {
  std::mutex mutex;
  std::set<std::thread::id> seen;
  std::atomic<int> count{0};
  parallel_for(size, 1, [&](std::int64_t, std::int64_t) {
    {
      const std::lock_guard lock(mutex);
      seen.insert(std::this_thread::get_id());
      count = static_cast<int>(seen.size());
    }
    while (count < expected) std::this_thread::yield();
  });
  return seen;
}

// Runs fn in a forked child that is killed when it hangs; its exit status.
template <class Fn>
int status_of_child(Fn&& fn) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(fn() ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  return status;
}

}  // namespace

TEST_CASE("parallel_for: ranges are disjoint, cover everything and respect the grain", "[threads]") {
  for (const int threads : {1, 2, 3, 8}) {
    const ThreadScope scope(threads);
    for (const std::int64_t size : {0, 1, 2, 3, 7, 64, 1000, 1001}) {
      for (const std::int64_t grain : {-1, 0, 1, 5, 64, 1000, 5000}) {
        INFO(threads << " threads, " << size << " by " << grain);
        std::int64_t next = 0;
        for (const auto& [begin, end] : ranges_of(size, grain)) {
          CHECK(begin == next);
          CHECK(begin < end);
          if (end != size) CHECK(end - begin >= grain);
          next = end;
        }
        CHECK(next == size);
      }
    }
  }
}

TEST_CASE("parallel_for: each thread begins with its own share, whatever it is told to bring near", "[threads]") {
  constexpr int kThreads = 3;
  const ThreadScope scope(kThreads);
  const std::vector<std::byte> memory(1000);
  const Upcoming next[] = {{memory.data(), 1000}, {memory.data() + 1, 63}, {}, {memory.data(), 64}};
  for (const std::int64_t size : {3, 4, 100})
    for (const std::int64_t grain : {1, 7})
      for (const std::size_t given : {0, 2, 4}) {
        if (size < kThreads * grain) continue;
        INFO(size << " by " << grain << ", " << given << " told");
        std::set<std::int64_t> expected, begins;
        for (int thread = 0; thread < kThreads; ++thread) expected.insert(begin_of_thread(size, grain, thread));
        CHECK(begin_of_thread(size, grain, kThreads) == size);
        std::mutex mutex;
        std::map<std::thread::id, std::int64_t> first;
        std::atomic<std::size_t> count{0};
        const auto meet = [&](std::int64_t begin, std::int64_t) {
          {
            const std::lock_guard lock(mutex);
            first.emplace(std::this_thread::get_id(), begin);
            count = first.size();
          }
          while (count < kThreads) std::this_thread::yield();
        };
        parallel_for(size, grain, meet, std::span(next).first(given));
        for (const auto& [thread, begin] : first) begins.insert(begin);
        CHECK(expected.size() == kThreads);
        CHECK(begins == expected);
      }
}

TEST_CASE("parallel_for: more items than a share can count are cut into longer grains", "[threads]") {
  const ThreadScope scope(3);
  constexpr std::int64_t kSize = (std::int64_t{1} << 33) + 5;
  std::int64_t next = 0;
  for (const auto& [begin, end] : ranges_of(kSize, 1)) {
    CHECK(begin == next);
    next = end;
  }
  CHECK(next == kSize);
}

TEST_CASE("parallel_for: what a delayed thread has not begun is done by the others", "[threads]") {
  const ThreadScope scope(3);
  constexpr std::int64_t kSize = 100;
  for (const std::int64_t delayed : {std::int64_t{0}, begin_of_thread(kSize, 1, 1)}) {
    const auto completes = [&] {
      std::atomic<std::int64_t> left{kSize};
      parallel_for(kSize, 1, [&](std::int64_t begin, std::int64_t end) {
        if (begin == delayed)
          while (left > end - begin) std::this_thread::yield();
        left -= end - begin;
      });
      return left == 0;
    };
    CHECK(status_of_child(completes) == 0);
  }
}

TEST_CASE("parallel_for: a little more than the grain is shared", "[threads]") {
  const ThreadScope scope(2);
  CHECK(ranges_of(15, 8) == std::vector<Range>{{0, 8}, {8, 15}});
}

TEST_CASE("parallel_for: several threads take part", "[threads]") {
  const ThreadScope scope(2);
  std::mutex mutex;
  std::vector<std::thread::id> seen;
  // The first range waits until another thread has taken one, so that this cannot pass by accident nor fail by speed.
  std::atomic<int> started{0};
  parallel_for(2, 1, [&](std::int64_t, std::int64_t) {
    ++started;
    while (started < 2) std::this_thread::yield();
    const std::lock_guard lock(mutex);
    seen.push_back(std::this_thread::get_id());
  });
  REQUIRE(seen.size() == 2);
  CHECK(seen[0] != seen[1]);
}

TEST_CASE("parallel_for: the exception of a range reaches the caller and the pool lives on", "[threads]") {
  const ThreadScope scope(3);
  for (int turn = 0; turn < 100; ++turn) {
    const auto fail_at = [&](std::int64_t begin, std::int64_t end) {
      if (begin <= turn && turn < end) throw std::out_of_range("range " + std::to_string(turn));
    };
    CHECK_THROWS_AS(parallel_for(100, 1, fail_at), std::out_of_range);
    CHECK(parallel_sum(100) == 4950);
  }
}

TEST_CASE("parallel_for: a nested call runs on its caller", "[threads]") {
  const ThreadScope scope(2);
  std::atomic<std::int64_t> sum{0};
  std::atomic<int> strangers{0};
  parallel_for(8, 1, [&](std::int64_t begin, std::int64_t end) {
    const auto me = std::this_thread::get_id();
    for (std::int64_t i = begin; i < end; ++i)
      parallel_for(100, 1, [&](std::int64_t first, std::int64_t last) {
        strangers += std::this_thread::get_id() != me;
        sum += last - first;
      });
  });
  CHECK(sum == 800);
  CHECK(strangers == 0);
  CHECK(ranges_of(1000, 1).size() > 1);  // and the caller may use the pool again
}

TEST_CASE("parallel_for: concurrent callers all finish, while threads come and go", "[threads]") {
  const ThreadScope scope(3);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&wrong, caller] {
      for (int turn = 0; turn < 200; ++turn) {
        if (caller == 0 && turn % 20 == 0) set_num_threads(1 + turn / 20 % 4);
        wrong += parallel_sum(257) != 257 * 256 / 2;
      }
    });
  for (auto& caller : callers) caller.join();
  CHECK(wrong == 0);
}

TEST_CASE("parallel_for: sleeping workers wake up", "[threads]") {
  const ThreadScope scope(2);
  for (int turn = 0; turn < 5; ++turn) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK(parallel_sum(1000) == 499500);
  }
}

TEST_CASE("set_num_threads: takes 1 to 1024 and says so", "[threads]") {
  const int before = num_threads();
  for (const int count : {0, -1, 1025}) {
    const std::string message = input_error_of([&] { set_num_threads(count); });
    CHECK(message.find("set_num_threads: " + std::to_string(count)) == 0);
    CHECK(num_threads() == before);
  }
  const ThreadScope scope(5);
  CHECK(num_threads() == 5);
}

TEST_CASE("ThreadLimit: so many threads take part, fewer or more than the process uses", "[threads]") {
  const ThreadScope scope(3);
  for (const int count : {1, 2, 5, 3, 2, 4}) {
    const ThreadLimit limit(count);
    CHECK(num_threads() == count);
    CHECK(threads_of(64, count).size() == static_cast<std::size_t>(count));
    CHECK(parallel_sum(1000) == 499500);
  }
  CHECK(num_threads() == 3);
  CHECK(threads_of(64, 3).size() == 3);
}

TEST_CASE("ThreadLimit: scopes nest, 0 changes nothing, other threads see nothing", "[threads]") {
  const ThreadScope scope(3);
  {
    const ThreadLimit outer(2);
    {
      const ThreadLimit inner(4), none(0);
      CHECK(num_threads() == 4);
    }
    CHECK(num_threads() == 2);
    set_num_threads(6);
    CHECK(num_threads() == 2);
    int elsewhere = 0;
    std::thread([&] { elsewhere = num_threads(); }).join();
    CHECK(elsewhere == 6);
  }
  CHECK(num_threads() == 6);
}

TEST_CASE("ThreadLimit: takes 0 to 1024 and says so", "[threads]") {
  for (const int count : {-1, 1025}) {
    const std::string message = input_error_of([&] { const ThreadLimit limit(count); });
    CHECK(message.find("ThreadLimit: " + std::to_string(count)) == 0);
  }
}

TEST_CASE("ThreadLimit: callers with limits of their own do not disturb each other", "[threads]") {
  const ThreadScope scope(2);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&wrong, caller] {
      for (int turn = 0; turn < 200; ++turn) {
        const int count = 1 + (caller + turn) % 4;
        const ThreadLimit limit(count);
        wrong += parallel_sum(257) != 257 * 256 / 2;
        wrong += threads_of(40, 1).size() > static_cast<std::size_t>(count);
      }
    });
  for (auto& caller : callers) caller.join();
  CHECK(wrong == 0);
}

TEST_CASE("parallel_for: works in a forked child and afterwards in its parent", "[threads]") {
  const ThreadScope scope(2);
  CHECK(parallel_sum(1000) == 499500);
  CHECK(status_of_child([] { return parallel_sum(1000) == 499500; }) == 0);
  CHECK(parallel_sum(1000) == 499500);
}

TEST_CASE("parallel_for: a fork in the middle of other threads' work does not hang the child", "[threads]") {
#ifdef __SANITIZE_THREAD__
  WARN("skipped: ThreadSanitizer's own list of threads does not survive such a fork");
  return;
#endif
  const ThreadScope scope(2);
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) parallel_sum(100000);
  });
  for (int turn = 0; turn < 10; ++turn) CHECK(status_of_child([] { return parallel_sum(1000) == 499500; }) == 0);
  stop = true;
  busy.join();
}

}  // namespace qtale::test

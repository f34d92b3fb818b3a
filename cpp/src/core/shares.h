// How parallel_for deals its work to threads, and what they bring near while they wait.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>

#include "core/integers.h"
#include "qtale/parallel.h"

namespace qtale {

// The grains that one thread has to do. It takes them from the front, so that it reads on through memory, and others
// that have done theirs take them from the back. Ranges get shorter and shorter: long ones run well, and with short
// ones at the end all threads end together, also where the host has delayed some.
// Nothing is published by it, so relaxed order does: the pool's mutex hands the call out, its count of workers
// collects.
class alignas(64) Share {
 public:
  void set(std::int64_t begin, std::int64_t end) {
    ends_.store(pack(static_cast<std::uint32_t>(begin), static_cast<std::uint32_t>(end)), std::memory_order_relaxed);
  }

  struct Range {
    std::uint32_t begin, end;
  };
  std::optional<Range> take(bool front) {
    std::uint64_t ends = ends_.load(std::memory_order_relaxed);
    for (;;) {
      const auto begin = static_cast<std::uint32_t>(ends >> 32), end = static_cast<std::uint32_t>(ends);
      if (begin >= end) return std::nullopt;
      const std::uint32_t count = std::max(1U, (end - begin) / kPart), middle = front ? begin + count : end - count;
      const std::uint64_t left = front ? pack(middle, end) : pack(begin, middle);
      if (!ends_.compare_exchange_weak(ends, left, std::memory_order_relaxed)) continue;
      return front ? Range{begin, middle} : Range{middle, end};
    }
  }

 private:
  static constexpr std::uint32_t kPart = 2;  // a range is this part of what is left

  static std::uint64_t pack(std::uint32_t begin, std::uint32_t end) { return std::uint64_t{begin} << 32 | end; }

  std::atomic<std::uint64_t> ends_{0};
};

// How a call is cut: into grains of equal length, and these among threads as evenly as can be.
struct Cut {
  std::int64_t grain, grains, threads;

  Cut(std::int64_t size, std::int64_t least_grain, int thread_count)
      : grain(std::max({std::int64_t{1}, least_grain, ceil_div(size, kMostGrains)})),
        grains(ceil_div(size, grain)),
        threads(thread_count) {}
  // The first grain of a thread; where the next one begins, it ends.
  std::int64_t begin_of(std::int64_t thread) const { return ceil_div(thread * grains, threads); }

 private:
  static constexpr std::int64_t kMostGrains = std::int64_t{1} << 31;
};

// Brings memory into the second cache a few lines at a time. On cache lines of its own, which nobody else waits for.
class alignas(64) Ahead {
 public:
  Ahead() = default;
  explicit Ahead(const Upcoming& memory) : at_(memory.data), left_(memory.bytes) {}

  // Whether something is left.
  bool step() {
    for (int line = 0; line < kLines && left_ > 0; ++line, at_ += kLine, left_ -= kLine) __builtin_prefetch(at_, 0, 2);
    return left_ > 0;
  }

 private:
  static constexpr int kLines = 8;  // about as many as are on their way at once
  static constexpr std::int64_t kLine = 64;

  const std::byte* at_ = nullptr;
  std::int64_t left_ = 0;
};

}  // namespace qtale

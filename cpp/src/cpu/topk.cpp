// The product of x with a vocabulary, cut down to the k best of every row while it is made.
#include "cpu/topk.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "core/text.h"
#include "cpu/backend.h"
#include "cpu/isa.h"
#include "cpu/project.h"
#include "cpu/scratch.h"
#include "qtale/parallel.h"

namespace qtale::cpu {
namespace {

constexpr std::int64_t kMinCapacity = 16;     // keys per row
constexpr std::int64_t kRunGrain = 1048576;   // multiply-adds worth a second thread
constexpr std::int64_t kMergeGrain = 4096;    // keys worth a second thread
constexpr std::int64_t kTilesPerChunk = 8;    // at most: neighbouring tiles are read ahead
constexpr std::int64_t kChunksPerThread = 8;  // at least, where there are so many tiles

constexpr std::int64_t kSlack = 8;     // a cut may leave one eighth more keys than asked for
constexpr std::int64_t kFewKeys = 24;  // that std::nth_element handles as well
constexpr int kMaxRounds = 32;         // before std::nth_element takes over: it has no bad cases

Key* median(Key* a, Key* b, Key* c) {
  if (*a > *b) std::swap(a, b);
  return *c < *a ? a : *c < *b ? c : b;
}

// Median of the medians of three times three keys.
Key* choose_pivot(Key* keys, std::int64_t size) {
  const std::int64_t step = size / 9;
  Key* medians[3];
  for (Key*& m : medians) {
    m = median(keys, keys + step, keys + 2 * step);
    keys += 3 * step;
  }
  return median(medians[0], medians[1], medians[2]);
}

// Moves keys above the last one to the front and the last one behind them; returns their number. No branch depends on
// a key: they are in random order.
std::int64_t partition(Key* keys, std::int64_t size) {
  const Key pivot = keys[size - 1];
  std::int64_t above = 0;
  for (std::int64_t i = 0; i < size - 1; ++i) {
    const Key key = keys[i];
    keys[i] = keys[above];
    keys[above] = key;
    above += key > pivot;
  }
  std::swap(keys[above], keys[size - 1]);
  return above;
}

// Brings the best keys to the front, from `wanted` to `wanted + slack` of them with the least one last; returns their
// number.
std::int64_t partition_best(Key* keys, std::int64_t size, std::int64_t wanted, std::int64_t slack) {
  std::int64_t begin = 0, end = size;
  for (int round = 0; round < kMaxRounds && end - begin > kFewKeys; ++round) {
    std::swap(*choose_pivot(keys + begin, end - begin), keys[end - 1]);
    const std::int64_t above = begin + partition(keys + begin, end - begin);
    const std::int64_t kept = above + 1;
    if (kept > wanted + slack) {
      end = above;
    } else if (kept < wanted) {
      begin = kept;
    } else {
      return kept;
    }
  }
  std::nth_element(keys + begin, keys + wanted - 1, keys + end, std::greater<>());
  return wanted;
}

// The candidates of one thread with their memory.
class Finder {
 public:
  bool started() const { return keys_ != nullptr; }

  void start(std::int64_t rows, std::int64_t row_tile, std::int64_t entries, std::int64_t k, std::size_t scratch) {
    const std::int64_t capacity = std::min(entries, std::max(2 * k, kMinCapacity));
    keys_ = std::make_unique_for_overwrite<Key[]>(static_cast<std::size_t>(rows * capacity));
    counts_.assign(static_cast<std::size_t>(rows), 0);
    const std::int64_t padded = ceil_div(rows, row_tile) * row_tile;
    thresholds_.assign(static_cast<std::size_t>(padded), std::numeric_limits<float>::quiet_NaN());
    candidates_ = {k, capacity, keys_.get(), counts_.data(), thresholds_.data(), kNoNan};
    scratch_.reserve(scratch);
  }

  std::byte* scratch() { return scratch_.reserve(0); }
  Candidates& candidates() { return candidates_; }

 private:
  std::unique_ptr<Key[]> keys_;
  std::vector<std::int32_t> counts_;
  std::vector<float> thresholds_;
  Candidates candidates_{};
  Scratch scratch_;
};

struct Problem {
  const ProjectKernel& kernel;
  ProjectArgs args;
  std::int64_t first_row;
  std::int64_t entries;
  std::int64_t k;
};

// Every finder takes the next chunk of entries until none is left, so each meets ascending chunks.
void find_candidates(const Problem& p, std::vector<Finder>& finders) {
  const auto threads = static_cast<std::int64_t>(finders.size());
  const std::int64_t tiles = ceil_div(p.entries, p.kernel.entry_tile);
  const std::int64_t per_chunk = std::clamp<std::int64_t>(tiles / (threads * kChunksPerThread), 1, kTilesPerChunk);
  const std::int64_t chunk = per_chunk * p.kernel.entry_tile;
  std::atomic<std::int64_t> next{0};
  parallel_for(threads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (; begin < end; ++begin) {
      Finder& finder = finders[static_cast<std::size_t>(begin)];
      for (;;) {
        const std::int64_t entry = next.fetch_add(chunk, std::memory_order_relaxed);
        if (entry >= p.entries) break;
        if (!finder.started())
          finder.start(p.args.rows, p.kernel.row_tile, p.entries, p.k, p.kernel.scratch_bytes(p.args.rows));
        p.kernel.find(p.args, entry, std::min(entry + chunk, p.entries), finder.scratch(), finder.candidates());
      }
    }
  });
}

void refuse_nan(const Problem& p, std::vector<Finder>& finders) {
  std::int64_t place = kNoNan;
  for (Finder& finder : finders)
    if (finder.started()) place = std::min(place, finder.candidates().first_nan);
  if (place == kNoNan) return;
  fail_input(
      "project_topk: row {} of x times row {} of the matrix is NaN; look for NaN and infinity in both and repair them.",
      p.first_row + (place >> 31), place & 0x7fffffff);
}

void merge(const Problem& p, std::vector<Finder>& finders, float* values, std::int32_t* indices) {
  const std::int64_t grain = ceil_div(kMergeGrain, p.k);
  parallel_for(p.args.rows, grain, [&](std::int64_t begin, std::int64_t end) {
    std::vector<Key> keys;
    for (; begin < end; ++begin) {
      keys.clear();
      for (Finder& finder : finders) {
        if (!finder.started()) continue;
        const Candidates& c = finder.candidates();
        const Key* row = c.keys + begin * c.capacity;
        keys.insert(keys.end(), row, row + c.counts[begin]);
      }
      const auto best = keys.begin() + static_cast<std::ptrdiff_t>(p.k);
      if (best != keys.end()) partition_best(keys.data(), static_cast<std::int64_t>(keys.size()), p.k, 0);
      std::sort(keys.begin(), best, std::greater<>());
      const std::int64_t at = (p.first_row + begin) * p.k;
      std::transform(keys.begin(), best, values + at, value_of);
      std::transform(keys.begin(), best, indices + at, entry_of);
    }
  });
}

}  // namespace

void cut_to_best(Candidates& c, std::int64_t row) {
  std::int32_t& count = c.counts[row];
  if (count <= c.k) return;
  Key* keys = c.keys + row * c.capacity;
  count = static_cast<std::int32_t>(partition_best(keys, count, c.k, c.k / kSlack));
  c.thresholds[row] = value_of(keys[count - 1]);
}

void project_topk(const RowsIn& x, std::int64_t rows, std::int64_t depth, const RowsIn& matrix, std::int64_t entries,
                  std::int64_t k, float* values, std::int32_t* indices) {
  const ProjectKernel& kernel = kernels().project;
  Scratch packed;
  for_passes(kernel, rows, [&](std::int64_t row, std::int64_t count) {
    const RowsIn part{static_cast<const float*>(x.data) + row * x.stride, x.dtype, x.stride};
    std::byte* const memory = packed.reserve(kernel.packed_bytes(count, depth));
    const Problem problem{kernel, {part, count, depth, memory, matrix}, row, entries, k};
    const std::int64_t work = std::max<std::int64_t>(1, count * depth) * entries;
    std::vector<Finder> finders(static_cast<std::size_t>(std::clamp<std::int64_t>(work / kRunGrain, 1, num_threads())));
    pack_rows(kernel, problem.args);
    find_candidates(problem, finders);
    refuse_nan(problem, finders);
    merge(problem, finders, values, indices);
  });
}

}  // namespace qtale::cpu

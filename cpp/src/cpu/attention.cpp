// Attention over all threads: blocks of queries that share a KV head, and where these are few also spans of entries.
#include <algorithm>
#include <vector>

#include "core/integers.h"
#include "cpu/decoder.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "qtale/parallel.h"

namespace qtale::cpu {
namespace {

constexpr std::int64_t kRunGrain = 65536;      // multiply-adds worth a second thread
constexpr std::int64_t kTasks = 4;             // a thread should have, or blocks are cut into spans
constexpr std::size_t kMaxStates = 16u << 20;  // bytes that cutting may take

struct Item {
  AttentionBlock block;
  std::int64_t begin, end;  // entries that any of its rows sees; empty where none sees one

  std::int64_t first_span() const { return begin / kAttentionSpan; }
  std::int64_t spans() const { return (end + kAttentionSpan - 1) / kAttentionSpan - first_span(); }
};

Item make_item(const AttentionArgs& args, const AttentionBlock& block) {
  Item item{block, INT64_MAX, 0};
  for (std::int64_t r = block.row; r < block.row + block.rows; ++r) {
    if (args.begin[r] >= args.end[r]) continue;
    item.begin = std::min<std::int64_t>(item.begin, args.begin[r]);
    item.end = std::max<std::int64_t>(item.end, args.end[r]);
  }
  if (item.end == 0) item.begin = 0;
  return item;
}

const AttentionKernel& kernel_for(const AttentionArgs& args) {
  const DecoderKernels& table = *kernels().decoder;
  const bool rounds = rounds_to_bfloat16(args.compute) || args.dtype == DType::s8;
  return rounds ? table.rounded.attention : table.attention;
}

class Attention {
 public:
  Attention(const AttentionArgs& args, std::span<const AttentionRun> runs, std::int64_t kv_heads)
      : args_(args), kernel_(kernel_for(args)) {
    for (const AttentionRun& run : runs) {
      const std::int64_t rows = rows_of_block(run, kv_heads * static_cast<std::int64_t>(runs.size()));
      // A head's entries stay in the cache for all of its blocks. Late rows see most: they come first, so that what
      // threads take from each other at the end is little.
      for (std::int64_t head = 0; head < kv_heads; ++head)
        for (std::int64_t row = (run.rows - 1) / rows * rows; row >= 0; row -= rows)
          items_.push_back(make_item(args, {run.pages.data(), run.row + row, std::min(rows, run.rows - row), head}));
      queries_ = std::max(queries_, rows * args.group);
    }
    state_bytes_ = (kernel_.state_bytes(args, queries_) + 63) / 64 * 64;
    for (const Item& item : items_) {
      spans_ += item.spans();
      work_ += (item.end - item.begin) * item.block.rows * args.group * args.head_dim * 2;
    }
  }

  void run() const {
    const auto items = static_cast<std::int64_t>(items_.size());
    const bool cut = num_threads() > 1 && items < num_threads() * kTasks && spans_ > items && work_ > kRunGrain &&
                     static_cast<std::size_t>(spans_) * state_bytes_ <= kMaxStates;
    if (cut) return run_spans();
    parallel_for(items, grain(items), [&](std::int64_t begin, std::int64_t end) {
      for (; begin < end; ++begin) run_item(items_[static_cast<std::size_t>(begin)]);
    });
  }

 private:
  // Rows of the blocks that a run is cut into, which are as long as another. Where there are few of what the kernel
  // likes best, they get shorter, down to a quarter, until all threads have some.
  std::int64_t rows_of_block(const AttentionRun& run, std::int64_t others) const {
    if (run.rows == 0) return 1;
    const auto blocks_of = [&](std::int64_t queries) {
      return ceil_div(run.rows, std::max<std::int64_t>(1, queries / args_.group));
    };
    std::int64_t blocks = blocks_of(kernel_.queries);
    if (num_threads() > 1)
      blocks = std::max(blocks, std::min(blocks_of(kernel_.queries / 4), ceil_div(num_threads() * kTasks, others)));
    return ceil_div(run.rows, blocks);
  }

  // Tasks out of `count` that are worth a second thread.
  std::int64_t grain(std::int64_t count) const {
    return std::max<std::int64_t>(1, kRunGrain * count / std::max<std::int64_t>(1, work_));
  }

  std::byte* scratch(std::size_t states) const {
    thread_local Scratch memory;
    return memory.reserve(states * state_bytes_ + kernel_.scratch_bytes(args_, queries_));
  }

  // The scratch is prepared for the item.
  void run_span(const Item& item, std::int64_t span, std::byte* scratch, std::byte* state) const {
    const std::int64_t begin = (item.first_span() + span) * kAttentionSpan;
    kernel_.run(args_, item.block, std::max(item.begin, begin), std::min(item.end, begin + kAttentionSpan), scratch,
                state);
  }

  void run_item(const Item& item) const {
    std::byte* const state = scratch(2);
    std::byte* const later = state + state_bytes_;
    std::byte* const rest = later + state_bytes_;
    kernel_.prepare(args_, item.block, rest);
    run_span(item, 0, rest, state);
    for (std::int64_t span = 1; span < item.spans(); ++span) {
      run_span(item, span, rest, later);
      kernel_.merge(args_, item.block, state, later);
    }
    kernel_.finish(args_, item.block, state);
  }

  void run_spans() const {
    struct Task {
      const Item* item;
      std::int64_t span;
    };
    std::vector<Task> tasks;
    std::vector<std::int64_t> first;  // task of each item
    for (const Item& item : items_) {
      first.push_back(static_cast<std::int64_t>(tasks.size()));
      for (std::int64_t span = 0; span < std::max<std::int64_t>(1, item.spans()); ++span)
        tasks.push_back({&item, span});
    }
    thread_local Scratch memory;
    std::byte* const states = memory.reserve(tasks.size() * state_bytes_);
    const auto state = [&](std::int64_t task) { return states + static_cast<std::size_t>(task) * state_bytes_; };
    const auto count = static_cast<std::int64_t>(tasks.size());
    parallel_for(count, grain(count), [&](std::int64_t begin, std::int64_t end) {
      for (; begin < end; ++begin) {
        const Task& task = tasks[static_cast<std::size_t>(begin)];
        std::byte* const own = scratch(0);
        kernel_.prepare(args_, task.item->block, own);
        run_span(*task.item, task.span, own, state(begin));
      }
    });
    for (std::size_t i = 0; i < items_.size(); ++i) {
      for (std::int64_t span = 1; span < items_[i].spans(); ++span)
        kernel_.merge(args_, items_[i].block, state(first[i]), state(first[i] + span));
      kernel_.finish(args_, items_[i].block, state(first[i]));
    }
  }

  const AttentionArgs& args_;
  const AttentionKernel& kernel_;
  std::vector<Item> items_;
  std::int64_t queries_ = 1;  // of the largest block
  std::int64_t spans_ = 0;
  std::int64_t work_ = 0;  // multiply-adds
  std::size_t state_bytes_ = 0;
};

}  // namespace

void attention(const AttentionArgs& args, std::span<const AttentionRun> runs, std::int64_t kv_heads) {
  Attention(args, runs, kv_heads).run();
}

}  // namespace qtale::cpu

// Quantized matrix products over all threads: prepare the activations, then split panels and rows.
#include <algorithm>
#include <vector>

#include "core/integers.h"
#include "core/text.h"
#include "cpu/backend.h"
#include "cpu/isa.h"
#include "cpu/prepacked.h"
#include "cpu/scratch.h"
#include "qtale/parallel.h"

namespace qtale::cpu {
namespace {

constexpr std::int64_t kPrepareGrain = 65536;  // activation elements worth a second thread
constexpr std::int64_t kRunGrain = 262144;     // multiply-adds worth a second thread
constexpr std::int64_t kLeastShare = 4;        // ranges of a product that is worth it may be this much shorter
constexpr std::int64_t kAheadBytes = 262144;   // of the next product, for each thread: as much as comes while it waits

Prepacked open(const PrepackedBuffer& buffer, const KernelTable& table) {
  const Prepacked weight = open_prepacked(buffer.data, buffer.bytes);
  if (weight.layout.panel_rows != table.panel_rows)
    fail_input(
        "qmatmul: the weight was prepacked in panels of {} rows, but the kernels in use ({}) read {}; "
        "prepack it again.",
        weight.layout.panel_rows, table.name, table.panel_rows);
  return weight;
}

// Whether kernels prepare the same activations for both.
bool same_inputs(const Layout& a, const Layout& b) {
  return a.k == b.k && a.num_bits == b.num_bits && a.block_k == b.block_k && a.per_channel == b.per_channel &&
         a.symmetric == b.symmetric;
}

void prepare(const MatmulKernel& kernel, const MatmulArgs& args) {
  const std::int64_t tile = kernel.row_tile;
  const std::int64_t grain = ceil_div(kPrepareGrain, tile * std::max<std::int64_t>(1, args.layout->k));
  parallel_for(ceil_div(args.rows, tile), grain, [&](std::int64_t begin, std::int64_t end) {
    kernel.prepare(args, begin * tile, std::min(end * tile, args.rows));
  });
}

// How weights side by side are cut into tasks, which run through all panels of one block of rows before the next block.
class Tasks {
 public:
  Tasks(const MatmulKernel& kernel, std::span<const Prepacked> weights, std::int64_t rows)
      : weights_(weights), rows_(rows) {
    for (const Prepacked& weight : weights) panels_ += weight.layout.panels;
    blocks_ = ceil_div(rows, kernel.row_block);
    block_ = ceil_div(rows, std::max<std::int64_t>(1, blocks_) * kernel.row_tile) * kernel.row_tile;
  }

  struct Place {
    std::size_t weight;
    std::int64_t panel, row_begin, row_end;
  };
  Place at(std::int64_t task) const {
    Place place{0, task % panels_, task / panels_ * block_, 0};
    place.row_end = std::min(rows_, place.row_begin + block_);
    for (; place.panel >= panels(place.weight); ++place.weight) place.panel -= panels(place.weight);
    return place;
  }
  std::int64_t panels(std::size_t weight) const { return weights_[weight].layout.panels; }

  std::int64_t size() const { return blocks_ * panels_; }
  std::int64_t rows_at_once() const { return std::min(rows_, block_); }
  std::int64_t grain() const {
    const Layout& l = weights_[0].layout;
    const std::int64_t worth = ceil_div(kRunGrain, std::max<std::int64_t>(1, l.panel_rows * l.k * rows_at_once()));
    return size() <= worth ? worth : ceil_div(worth, kLeastShare);
  }

  // What each thread reads first.
  std::vector<Upcoming> first_reads() const {
    std::vector<Upcoming> reads(static_cast<std::size_t>(num_threads()));
    for (int t = 0; t < std::ssize(reads); ++t) {
      const std::int64_t begin = begin_of_thread(size(), grain(), t), end = begin_of_thread(size(), grain(), t + 1);
      if (begin == end) continue;
      const Place place = at(begin);
      const Prepacked& weight = weights_[place.weight];
      const std::int64_t bytes = weight.layout.panel_bytes;
      const std::int64_t count = std::min(end - begin, panels(place.weight) - place.panel);
      reads[static_cast<std::size_t>(t)] = {reinterpret_cast<const std::byte*>(weight.panels + place.panel * bytes),
                                            std::min(kAheadBytes, count * bytes)};
    }
    return reads;
  }

 private:
  std::span<const Prepacked> weights_;
  std::int64_t rows_;
  std::int64_t panels_ = 0;
  std::int64_t blocks_ = 0, block_ = 0;  // of rows: how many, how long
};

// The leading ones of `weights` that read the same prepared activations.
std::span<const Prepacked> together(std::span<const Prepacked> weights) {
  std::size_t count = 1;
  while (count < weights.size() && same_inputs(weights[0].layout, weights[count].layout)) ++count;
  return weights.first(count);
}

std::vector<Upcoming> first_reads(const MatmulKernel& kernel, std::span<const Prepacked> weights, std::int64_t rows) {
  if (weights.empty() || num_threads() == 1) return {};
  return Tasks(kernel, together(weights), rows).first_reads();
}

// args: of each weight.
void run(const MatmulKernel& kernel, const Tasks& tasks, std::span<const MatmulArgs> args,
         std::span<const Upcoming> next) {
  const auto run_range = [&](std::int64_t begin, std::int64_t end) {
    thread_local Scratch own;
    std::byte* scratch = kernel.scratch_bytes == nullptr
                             ? nullptr
                             : own.reserve(kernel.scratch_bytes(*args[0].layout, tasks.rows_at_once()));
    while (begin < end) {
      const Tasks::Place place = tasks.at(begin);
      const std::int64_t stop = std::min(tasks.panels(place.weight), place.panel + (end - begin));
      MatmulArgs mine = args[place.weight];
      mine.scratch = scratch;
      kernel.run(mine, place.panel, stop, place.row_begin, place.row_end);
      begin += stop - place.panel;
    }
  };
  parallel_for(tasks.size(), tasks.grain(), run_range, next);
}

const MatmulKernel& kernel_for(const KernelTable& table, Compute compute) {
  switch (compute) {
    case Compute::int8: return table.int8;
    case Compute::int16: return *table.int16;
    default: return table.floating;
  }
}

}  // namespace

void qmatmul(std::span<const QmatmulPart> parts, std::int64_t rows, const RowsIn& x, Compute compute,
             std::span<const PrepackedBuffer> next) {
  const KernelTable& table = kernels();
  const MatmulKernel& kernel = kernel_for(table, compute);
  std::vector<Prepacked> weights;
  for (const QmatmulPart& part : parts) weights.push_back(open(part.weight, table));
  for (const PrepackedBuffer& buffer : next) weights.push_back(open(buffer, table));
  const std::span<const Prepacked> all(weights);
  thread_local Scratch scratch;
  for (std::size_t first = 0; first < parts.size();) {
    const std::span<const Prepacked> some = together(all.subspan(first, parts.size() - first));
    std::byte* workspace = scratch.reserve(kernel.workspace_bytes(some[0].layout, rows));
    std::vector<MatmulArgs> args;
    for (std::size_t i = 0; i < some.size(); ++i)
      args.push_back({&some[i].layout, some[i].panels, rows, x, workspace, parts[first + i].bias, parts[first + i].y});
    prepare(kernel, args[0]);
    first += some.size();
    const auto others = first < parts.size() ? all.subspan(first, parts.size() - first) : all.subspan(first);
    run(kernel, Tasks(kernel, some, rows), args, first_reads(kernel, others, rows));
  }
}

}  // namespace qtale::cpu

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

Prepacked open(const QmatmulPart& part, const KernelTable& table) {
  const Prepacked weight = open_prepacked(part.buffer, part.bytes);
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

// Weights side by side that read the same prepared activations. Tasks run through all panels of one block of rows
// before the next block.
class Product {
 public:
  Product(const MatmulKernel& kernel, std::span<const MatmulArgs> parts) : kernel_(kernel), parts_(parts) {
    for (const MatmulArgs& part : parts) panels_ += part.layout->panels;
    blocks_ = ceil_div(rows(), kernel.row_block);
    block_ = ceil_div(rows(), std::max<std::int64_t>(1, blocks_) * kernel.row_tile) * kernel.row_tile;
  }

  void run() const {
    const Layout& l = *parts_[0].layout;
    const std::int64_t rows_at_once = std::min(rows(), block_);
    const std::int64_t work = std::max<std::int64_t>(1, l.panel_rows * l.k * rows_at_once);
    const std::int64_t tasks = blocks_ * panels_, worth = ceil_div(kRunGrain, work);
    const std::int64_t grain = tasks <= worth ? worth : ceil_div(worth, kLeastShare);
    parallel_for(tasks, grain, [&](std::int64_t begin, std::int64_t end) {
      thread_local Scratch own;
      std::byte* scratch =
          kernel_.scratch_bytes == nullptr ? nullptr : own.reserve(kernel_.scratch_bytes(l, rows_at_once));
      while (begin < end) begin = run_some(begin, end, scratch);
    });
  }

 private:
  std::int64_t rows() const { return parts_[0].rows; }

  // Runs those of tasks [begin, end) that lie in the part and row block of the first; returns where they end.
  std::int64_t run_some(std::int64_t begin, std::int64_t end, std::byte* scratch) const {
    const std::int64_t row_block = begin / panels_;
    std::int64_t panel = begin % panels_;
    std::size_t part = 0;
    for (; panel >= parts_[part].layout->panels; ++part) panel -= parts_[part].layout->panels;
    const std::int64_t stop = std::min(parts_[part].layout->panels, panel + (end - begin));
    MatmulArgs args = parts_[part];
    args.scratch = scratch;
    kernel_.run(args, panel, stop, row_block * block_, std::min(rows(), (row_block + 1) * block_));
    return begin + stop - panel;
  }

  const MatmulKernel& kernel_;
  std::span<const MatmulArgs> parts_;
  std::int64_t panels_ = 0;
  std::int64_t blocks_ = 0, block_ = 0;  // of rows: how many, how long
};

}  // namespace

void qmatmul(std::span<const QmatmulPart> parts, std::int64_t rows, const RowsIn& x, Compute compute) {
  const KernelTable& table = kernels();
  const MatmulKernel& kernel = compute == Compute::int8 ? table.int8 : table.floating;
  std::vector<Prepacked> weights;
  for (const QmatmulPart& part : parts) weights.push_back(open(part, table));
  thread_local Scratch scratch;
  for (std::size_t first = 0; first < parts.size();) {
    std::byte* workspace = scratch.reserve(kernel.workspace_bytes(weights[first].layout, rows));
    std::vector<MatmulArgs> together;
    for (std::size_t i = first; i < parts.size() && same_inputs(weights[first].layout, weights[i].layout); ++i)
      together.push_back({&weights[i].layout, weights[i].panels, rows, x, workspace, parts[i].bias, parts[i].y});
    prepare(kernel, together[0]);
    Product(kernel, together).run();
    first += together.size();
  }
}

}  // namespace qtale::cpu

// gptq over all threads: blocks of columns in turn, within each of them panels of rows side by side.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/text.h"
#include "cpu/isa.h"
#include "cpu/solve_panels.h"
#include "qtale/parallel.h"

namespace qtale::cpu {
namespace {

class Gptq {
 public:
  explicit Gptq(const GptqArgs& args)
      : a_(args),
        kernels_(*kernels().solve),
        panels_(kernels_, args.weight, args.order),
        // Whole rows are one group whose columns no error has reached when it begins.
        grids_first_(args.static_scales || args.weight.groups == 1),
        block_(grids_first_ ? kColumnBlock : args.weight.group_size()),
        inverse_diagonal_(static_cast<std::size_t>(args.weight.columns)),
        loss_(static_cast<std::size_t>(args.weight.rows)) {
    for (std::size_t c = 0; c < inverse_diagonal_.size(); ++c)
      inverse_diagonal_[c] = 1.0f / a_.factor[static_cast<std::int64_t>(c) * (a_.factor_stride + 1)];
  }

  void run() {
    panels_.make_codes();
    parallel_for(panels_.count(), 1, [&](std::int64_t begin, std::int64_t end) {
      for (; begin < end; ++begin) load(begin);
    });
    Scratch memory;
    const std::int64_t columns = a_.weight.columns;
    for (std::int64_t begin = 0; begin < columns; begin += block_) {
      const std::int64_t end = std::min(begin + block_, columns);
      auto* packed = reinterpret_cast<float*>(
          memory.reserve(static_cast<std::size_t>(packed_floats(kernels_, columns, block_)) * sizeof(float)));
      pack_columns_parallel(kernels_, {a_.factor, a_.factor_stride, nullptr, end, Packing::plain}, begin, end, packed);
      const ColumnBlock block{
          packed, kernels_.tile * end, inverse_diagonal_.data(), panels_.order(), panels_.group_of(), begin,
          end,    a_.weight.num_bits};
      parallel_for(panels_.count(), 1, [&](std::int64_t first, std::int64_t last) {
        for (; first < last; ++first) run_block(block, first);
      });
    }
    finish();
  }

 private:
  void load(std::int64_t panel) {
    panels_.load(panel);
    if (a_.static_scales) return panels_.load_grids(panel);
    if (grids_first_) find_grid(panel, 0);
  }

  void find_grid(std::int64_t panel, std::int64_t group) {
    const std::int64_t size = a_.weight.group_size(), first = group * size, lanes = kernels_.lanes;
    const Importance importance{a_.importance ? a_.importance + first : nullptr};
    kernels_.grid(a_.rule, importance, panels_.work(panel) + first * lanes, size, nullptr,
                  panels_.grids(panel) + group * kGridRows * lanes);
    panels_.store_grid(panel, group);
  }

  void run_block(const ColumnBlock& block, std::int64_t panel) {
    const std::int64_t lanes = kernels_.lanes;
    kernels_.advance(block, panels_.work(panel));
    if (!grids_first_) find_grid(panel, block.begin / block_);
    float* totals = floats_of_thread(lanes);
    kernels_.gptq(block, block.begin, {panels_.work(panel), panels_.grids(panel), panels_.codes(panel), totals});
    for (std::int64_t lane = 0; lane < panels_.rows(panel); ++lane)
      loss_[static_cast<std::size_t>(panels_.first_row(panel) + lane)] += static_cast<double>(totals[lane]);
    if (block.end == a_.weight.columns) panels_.store_codes(panel, a_.codes);
  }

  void finish() const {
    for (std::size_t row = 0; row < loss_.size(); ++row)
      if (!std::isfinite(loss_[row]))
        fail_input("gptq: the errors of output row {} overflow float32; scale weight and factor to usual sizes.", row);
    if (a_.loss) std::copy(loss_.begin(), loss_.end(), a_.loss);
  }

  const GptqArgs& a_;
  const SolveKernels& kernels_;
  SolvePanels panels_;
  bool grids_first_;
  std::int64_t block_;
  std::vector<float> inverse_diagonal_;
  std::vector<double> loss_;
};

}  // namespace

void gptq(const GptqArgs& args) { Gptq(args).run(); }

}  // namespace qtale::cpu

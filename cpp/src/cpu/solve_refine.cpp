// refine_codes over all threads: blocks of columns in turn, within each of them panels of rows side by side.
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <vector>

#include "cpu/isa.h"
#include "cpu/solve_panels.h"
#include "qtale/parallel.h"

namespace qtale::cpu {
namespace {

class Refine {
 public:
  explicit Refine(const RefineArgs& args)
      : a_(args),
        kernels_(*kernels().solve),
        panels_(kernels_, args.weight, args.order),
        inverse_diagonal_(static_cast<std::size_t>(args.weight.columns)) {
    panels_.make_codes();
    for (std::size_t c = 0; c < inverse_diagonal_.size(); ++c) {
      const float diagonal = a_.hessian[panels_.order()[c] * (a_.hessian_stride + 1)];
      inverse_diagonal_[c] = diagonal >= FLT_MIN ? 1.0f / diagonal : 0.0f;
    }
  }

  std::int64_t run() {
    over_panels([&](std::int64_t panel) { load(panel); });
    std::int64_t changed = 0;
    for (int sweep = 0; sweep < a_.sweeps; ++sweep) {
      const std::int64_t now = visit_all();
      changed += now;
      if (now == 0) break;
    }
    over_panels([&](std::int64_t panel) { panels_.store_codes(panel, a_.codes); });
    return changed;
  }

 private:
  template <class Fn>
  void over_panels(Fn&& fn) {
    parallel_for(panels_.count(), 1, [&](std::int64_t begin, std::int64_t end) {
      for (; begin < end; ++begin) fn(begin);
    });
  }

  // Codes and what they leave of the weight.
  void load(std::int64_t panel) {
    const std::int64_t lanes = kernels_.lanes;
    panels_.load(panel);
    panels_.load_grids(panel);
    panels_.load_codes(panel, a_.codes);
    for (std::int64_t c = 0; c < a_.weight.columns; ++c) {
      const float* grid = panels_.grids(panel) + panels_.group_of()[c] * kGridRows * lanes;
      const std::int8_t* codes = panels_.codes(panel) + panels_.order()[c] * lanes;
      float* work = panels_.work(panel) + c * lanes;
      for (std::int64_t lane = 0; lane < lanes; ++lane)
        work[lane] -= (static_cast<float>(codes[lane]) - grid[kZero * lanes + lane]) * grid[kScale * lanes + lane];
    }
  }

  std::int64_t visit_all() {
    const std::int64_t columns = a_.weight.columns;
    auto* packed = reinterpret_cast<float*>(
        packed_.reserve(static_cast<std::size_t>(packed_floats(kernels_, columns, kColumnBlock)) * sizeof(float)));
    std::atomic<std::int64_t> changed{0};
    for (std::int64_t begin = 0; begin < columns; begin += kColumnBlock) {
      const std::int64_t end = std::min(begin + kColumnBlock, columns);
      pack_columns_parallel(kernels_, {a_.hessian, a_.hessian_stride, a_.order, columns, Packing::plain}, begin, end,
                            packed);
      const ColumnBlock block{
          packed, kernels_.tile * columns, inverse_diagonal_.data(), panels_.order(), panels_.group_of(), begin,
          end,    a_.weight.num_bits};
      over_panels([&](std::int64_t panel) {
        float* totals = floats_of_thread(kernels_.lanes);
        kernels_.refine(block, columns, {panels_.work(panel), panels_.grids(panel), panels_.codes(panel), totals});
        std::int64_t sum = 0;
        for (std::int64_t lane = 0; lane < panels_.rows(panel); ++lane) sum += static_cast<std::int64_t>(totals[lane]);
        changed += sum;
      });
    }
    return changed;
  }

  const RefineArgs& a_;
  const SolveKernels& kernels_;
  SolvePanels panels_;
  std::vector<float> inverse_diagonal_;
  Scratch packed_;
};

}  // namespace

std::int64_t refine_codes(const RefineArgs& args) { return Refine(args).run(); }

}  // namespace qtale::cpu

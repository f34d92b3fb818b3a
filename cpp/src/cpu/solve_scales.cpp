// search_scales, rounding_loss and prox_linf over all threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/text.h"
#include "cpu/isa.h"
#include "cpu/solve_panels.h"
#include "qtale/parallel.h"

namespace qtale::cpu {
namespace {

// The diagonal blocks of a Hessian as half forms, one after the other.
std::vector<float> packed_blocks(const SolveKernels& kernels, const SearchScalesArgs& a) {
  const std::int64_t size = a.weight.group_size(), stride = packed_floats(kernels, size, size);
  std::vector<float> packed(static_cast<std::size_t>(a.blocks ? a.weight.groups * stride : 0));
  parallel_for(a.blocks ? a.weight.groups : 0, 1, [&](std::int64_t begin, std::int64_t end) {
    for (; begin < end; ++begin)
      pack_columns(kernels, {a.blocks + begin * size * size, size, nullptr, size, Packing::half_form}, 0, size,
                   packed.data() + begin * stride);
  });
  return packed;
}

void search_panel(const SolveKernels& kernels, const SearchScalesArgs& a, SolvePanels& panels, const float* packed,
                  std::int64_t panel) {
  const std::int64_t size = a.weight.group_size(), lanes = kernels.lanes;
  panels.load(panel);
  float* scratch = floats_of_thread((size + kernels.tile) * lanes);
  for (std::int64_t g = 0; g < a.weight.groups; ++g) {
    const Importance importance{a.diagonal ? a.diagonal + g * size : nullptr,
                                a.blocks ? packed + g * packed_floats(kernels, size, size) : nullptr};
    kernels.grid(a.rule, importance, panels.work(panel) + g * size * lanes, size, scratch,
                 panels.grids(panel) + g * kGridRows * lanes);
    panels.store_grid(panel, g);
  }
}

}  // namespace

void search_scales(const SearchScalesArgs& a) {
  const SolveKernels& table = *kernels().solve;
  SolvePanels panels(table, a.weight, nullptr);
  const std::vector<float> packed = packed_blocks(table, a);
  parallel_for(panels.count(), 1, [&](std::int64_t begin, std::int64_t end) {
    for (; begin < end; ++begin) search_panel(table, a, panels, packed.data(), begin);
  });
}

double rounding_loss(const RoundingLossArgs& a) {
  const SolveKernels& table = *kernels().solve;
  const std::int64_t columns = a.weight.columns, size = a.weight.group_size(), lanes = table.lanes;
  SolvePanels panels(table, a.weight, nullptr);
  std::vector<float> ones(static_cast<std::size_t>(a.column_scale ? 0 : columns), 1.0f);
  const float* factors = a.column_scale ? a.column_scale : ones.data();
  parallel_for(panels.count(), 1, [&](std::int64_t begin, std::int64_t end) {
    float* scratch = floats_of_thread(size * lanes);
    for (; begin < end; ++begin) {
      panels.load(begin);
      for (std::int64_t c = 0; c < columns; c += size)
        table.rounding(a.rule, factors + c, size, scratch, panels.work(begin) + c * lanes);
    }
  });
  std::vector<double> loss(static_cast<std::size_t>(a.weight.rows));
  Scratch memory;
  auto* packed = reinterpret_cast<float*>(
      memory.reserve(static_cast<std::size_t>(packed_floats(table, columns, kColumnBlock)) * sizeof(float)));
  for (std::int64_t begin = 0; begin < columns; begin += kColumnBlock) {
    const std::int64_t end = std::min(begin + kColumnBlock, columns);
    pack_columns_parallel(table, {a.hessian, a.hessian_stride, nullptr, end, Packing::half_form}, begin, end, packed);
    const ColumnBlock block{packed, table.tile * end, nullptr, nullptr, nullptr, begin, end, 0};
    parallel_for(panels.count(), 1, [&](std::int64_t first, std::int64_t last) {
      float* totals = floats_of_thread(lanes);
      for (; first < last; ++first) {
        table.form(block, panels.work(first), totals);
        for (std::int64_t lane = 0; lane < panels.rows(first); ++lane)
          loss[static_cast<std::size_t>(panels.first_row(first) + lane)] += static_cast<double>(totals[lane]);
      }
    });
  }
  return std::accumulate(loss.begin(), loss.end(), 0.0);
}

void prox_linf(const ProxArgs& args, std::int64_t rows) {
  constexpr std::int64_t kGrain = 8192;  // values worth a second thread
  const SolveKernels& table = *kernels().solve;
  std::atomic<std::int64_t> bad{-1};
  parallel_for(rows, std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, args.in_features)),
               [&](std::int64_t begin, std::int64_t end) {
                 const std::int64_t row = table.prox(args, begin, end);
                 if (row >= 0) bad = row;
               });
  if (bad >= 0)
    fail_input("{}: row {} of values holds NaN or infinity; repair the values.",
               args.project ? "project_l1" : "prox_linf", bad.load());
}

}  // namespace qtale::cpu

#include "cpu/solve_panels.h"

#include <algorithm>
#include <numeric>

#include "core/scalar.h"
#include "cpu/project.h"
#include "qtale/parallel.h"

namespace qtale::cpu {
namespace {

float* floats(Scratch& memory, std::int64_t count) {
  return reinterpret_cast<float*>(memory.reserve(static_cast<std::size_t>(count) * sizeof(float)));
}

// Rows [from, to) of the tiles.
void pack_rows(const SolveKernels& kernels, const PackArgs& a, std::int64_t begin, std::int64_t end, std::int64_t from,
               std::int64_t to, float* packed) {
  const std::int64_t tile = kernels.tile;
  for (std::int64_t k = from; k < to; ++k) {
    const float* row = a.matrix + (a.order ? a.order[k] : k) * a.stride;
    for (std::int64_t c = begin; c < end; c += tile) {
      float* out = packed + (c - begin) * a.rows + k * tile;
      const std::int64_t count = std::min(tile, end - c);
      if (a.order == nullptr) {
        std::copy(row + c, row + c + count, out);
      } else {
        for (std::int64_t i = 0; i < count; ++i) out[i] = row[a.order[c + i]];
      }
      if (a.packing == Packing::half_form)
        for (std::int64_t i = 0; i < count; ++i) out[i] *= k < c + i ? 2.0f : k == c + i ? 1.0f : 0.0f;
      std::fill(out + count, out + tile, 0.0f);
    }
  }
}

// Parts of columns whose codes fit the first cache.
template <class Fn>
void over_column_parts(std::int64_t columns, Fn&& fn) {
  constexpr std::int64_t kPart = 64;
  for (std::int64_t begin = 0; begin < columns; begin += kPart) fn(begin, std::min(begin + kPart, columns));
}

}  // namespace

std::int64_t packed_floats(const SolveKernels& kernels, std::int64_t rows, std::int64_t columns) {
  return ceil_div(columns, kernels.tile) * kernels.tile * rows;
}

void pack_columns(const SolveKernels& kernels, const PackArgs& args, std::int64_t begin, std::int64_t end,
                  float* packed) {
  pack_rows(kernels, args, begin, end, 0, args.rows, packed);
}

void pack_columns_parallel(const SolveKernels& kernels, const PackArgs& args, std::int64_t begin, std::int64_t end,
                           float* packed) {
  constexpr std::int64_t kGrain = 65536;  // elements worth a second thread
  parallel_for(args.rows, ceil_div(kGrain, std::max<std::int64_t>(1, end - begin)),
               [&](std::int64_t from, std::int64_t to) { pack_rows(kernels, args, begin, end, from, to, packed); });
}

SolvePanels::SolvePanels(const SolveKernels& kernels, const SolveWeight& weight, const std::int32_t* order)
    : kernels_(kernels),
      weight_(weight),
      count_(ceil_div(weight.rows, kernels.lanes)),
      order_(static_cast<std::size_t>(weight.columns)),
      position_(order_.size()),
      group_of_(order_.size()),
      work_(floats(work_memory_, count_ * weight.columns * kernels.lanes)),
      grids_(floats(grid_memory_, count_ * weight.groups * kGridRows * kernels.lanes)) {
  if (order != nullptr) {
    std::copy_n(order, order_.size(), order_.begin());
  } else {
    std::iota(order_.begin(), order_.end(), 0);
  }
  for (std::size_t c = 0; c < order_.size(); ++c) {
    position_[static_cast<std::size_t>(order_[c])] = static_cast<std::int32_t>(c);
    group_of_[c] = static_cast<std::int32_t>(order_[c] / weight.group_size());
  }
}

std::int64_t SolvePanels::rows(std::int64_t panel) const { return std::min(lanes(), weight_.rows - first_row(panel)); }

void SolvePanels::load(std::int64_t panel) {
  kernels_.load(weight_.data + first_row(panel) * weight_.stride, weight_.stride, rows(panel), weight_.columns,
                position_.data(), work(panel));
}

void SolvePanels::load_grids(std::int64_t panel) {
  const std::int64_t lanes = kernels_.lanes;
  for (std::int64_t g = 0; g < weight_.groups; ++g) {
    float* grid = grids(panel) + g * kGridRows * lanes;
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      const bool used = lane < rows(panel);
      const std::int64_t at = (first_row(panel) + lane) * weight_.groups + g;
      grid[kScale * lanes + lane] = used ? load_scalar(weight_.scale, weight_.scale_dtype, at) : 1.0f;
      grid[kInverse * lanes + lane] = 1.0f / grid[kScale * lanes + lane];
      grid[kZero * lanes + lane] = used && weight_.zero_point ? static_cast<float>(weight_.zero_point[at]) : 0.0f;
    }
  }
}

void SolvePanels::store_grid(std::int64_t panel, std::int64_t group) {
  store_grid_rows(weight_, first_row(panel), rows(panel), group, lanes(), grids(panel) + group * kGridRows * lanes());
}

void SolvePanels::make_codes() { codes_.resize(static_cast<std::size_t>(count_ * weight_.columns * lanes())); }

void SolvePanels::load_codes(std::int64_t panel, const std::int8_t* rows) {
  const std::int64_t columns = weight_.columns;
  rows += first_row(panel) * columns;
  over_column_parts(columns, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t lane = 0; lane < this->rows(panel); ++lane)
      for (std::int64_t c = begin; c < end; ++c) codes(panel)[c * lanes() + lane] = rows[lane * columns + c];
  });
}

void SolvePanels::store_codes(std::int64_t panel, std::int8_t* rows) {
  const std::int64_t columns = weight_.columns;
  rows += first_row(panel) * columns;
  over_column_parts(columns, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t lane = 0; lane < this->rows(panel); ++lane)
      for (std::int64_t c = begin; c < end; ++c) rows[lane * columns + c] = codes(panel)[c * lanes() + lane];
  });
}

void store_grid_rows(const SolveWeight& weight, std::int64_t first_row, std::int64_t rows, std::int64_t group,
                     std::int64_t lanes, const float* grid) {
  for (std::int64_t lane = 0; lane < rows; ++lane) {
    const std::int64_t at = (first_row + lane) * weight.groups + group;
    store_scalar(weight.scale, weight.scale_dtype, at, grid[kScale * lanes + lane]);
    if (weight.zero_point) weight.zero_point[at] = static_cast<std::int8_t>(grid[kZero * lanes + lane]);
  }
}

float* floats_of_thread(std::int64_t count) {
  thread_local Scratch memory;
  return floats(memory, count);
}

}  // namespace qtale::cpu

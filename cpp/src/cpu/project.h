// What project_topk and matmul share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/integers.h"
#include "cpu/kernels.h"

namespace qtale::cpu {

// Calls fn(row, count) for the rows of x that one pass over the matrix takes, which bounds the memory. Passes are even:
// a short last one would be multiplied as few rows are, which takes longer and neither gates nor adds.
template <class Fn>
void for_passes(const ProjectKernel& kernel, std::int64_t rows, Fn&& fn) {
  constexpr std::int64_t kMostRows = 512;
  const std::int64_t tile = kernel.row_tile, tiles = ceil_div(rows, tile), passes = ceil_div(rows, kMostRows);
  for (std::int64_t pass = 0; pass < passes; ++pass) {
    const std::int64_t row = tiles * pass / passes * tile, end = tiles * (pass + 1) / passes * tile;
    fn(row, std::min(end, rows) - row);
  }
}

// The pack step over all threads.
void pack_rows(const ProjectKernel& kernel, const ProjectArgs& args);

}  // namespace qtale::cpu

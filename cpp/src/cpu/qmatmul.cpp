// One quantized matrix product over all threads: prepare the activations, then split panels and rows.
#include <algorithm>

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

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

void qmatmul(const std::uint8_t* buffer, std::int64_t bytes, std::int64_t rows, const RowsIn& x, const float* bias,
             const RowsOut& y, Compute compute) {
  const KernelTable& table = kernels();
  const Prepacked weight = open_prepacked(buffer, bytes);
  const Layout& l = weight.layout;
  if (l.panel_rows != table.panel_rows)
    fail_input(
        "qmatmul: the weight was prepacked in panels of {} rows, but the kernels in use ({}) read {}; "
        "prepack it again.",
        l.panel_rows, table.name, table.panel_rows);
  const MatmulKernel& kernel = compute == Compute::int8 ? table.int8 : table.floating;
  thread_local Scratch scratch;
  const MatmulArgs args{&l, weight.panels, rows, x, scratch.reserve(kernel.workspace_bytes(l, rows)), bias, y};

  const std::int64_t tile = kernel.row_tile;
  const std::int64_t tiles_per_prepare = ceil_div(kPrepareGrain, tile * std::max<std::int64_t>(1, l.k));
  parallel_for(ceil_div(rows, tile), tiles_per_prepare, [&](std::int64_t begin, std::int64_t end) {
    kernel.prepare(args, begin * tile, std::min(end * tile, rows));
  });

  const std::int64_t row_blocks = ceil_div(rows, kernel.row_block);
  const std::int64_t block = ceil_div(rows, std::max<std::int64_t>(1, row_blocks) * tile) * tile;
  const std::int64_t work_per_task = std::max<std::int64_t>(1, l.panel_rows * l.k * std::min(rows, block));
  // Tasks run through the panels of one block of rows before the next block.
  parallel_for(row_blocks * l.panels, ceil_div(kRunGrain, work_per_task), [&](std::int64_t begin, std::int64_t end) {
    thread_local Scratch own;
    MatmulArgs mine = args;
    if (kernel.scratch_bytes != nullptr) mine.scratch = own.reserve(kernel.scratch_bytes(l, std::min(rows, block)));
    while (begin < end) {
      const std::int64_t row_block = begin / l.panels, panel = begin % l.panels;
      const std::int64_t stop = std::min(l.panels, panel + (end - begin));
      kernel.run(mine, panel, stop, row_block * block, std::min(rows, (row_block + 1) * block));
      begin += stop - panel;
    }
  });
}

}  // namespace qtale::cpu

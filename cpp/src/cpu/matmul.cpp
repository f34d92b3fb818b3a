// The products of x with matrices that are not quantized, over all threads.
#include <algorithm>
#include <span>

#include "core/text.h"
#include "cpu/backend.h"
#include "cpu/isa.h"
#include "cpu/project.h"
#include "cpu/scratch.h"
#include "qtale/parallel.h"

namespace qtale::cpu {
namespace {

constexpr std::int64_t kRowBlock = 512;     // rows of one pass over the matrix
constexpr std::int64_t kPackGrain = 65536;  // elements of x worth a second thread
constexpr std::int64_t kRunGrain = 65536;   // multiply-adds worth a second thread: few rows wait for memory

const ProjectKernel& kernel_for(Compute compute, std::int64_t in_features) {
  const KernelTable& table = kernels();
  if (compute != Compute::bfloat16) return table.project;
  if (table.bf16_project == nullptr)
    fail_input("matmul: {} has no products of bfloat16 numbers (AVX-512 BF16 has); compute in float.", table.name);
  if (in_features % 2 != 0)
    fail_input("matmul: bfloat16 numbers are multiplied by pairs, but x has {} features; compute in float.",
               in_features);
  return *table.bf16_project;
}

// Groups [begin, end) of all parts, which begin with a new group each.
void store_groups(const ProjectKernel& kernel, ProjectArgs args, std::span<const MatmulPart> parts, std::int64_t row,
                  std::int64_t begin, std::int64_t end) {
  thread_local Scratch scratch;
  std::byte* const memory = scratch.reserve(kernel.scratch_bytes(args.rows));
  for (const MatmulPart& part : parts) {
    const std::int64_t groups = ceil_div(part.entries, kernel.entry_group);
    if (begin < groups && end > 0) {
      const ProjectOut out{part.out.y + row * part.out.stride, part.out.stride, part.out.bias};
      args.matrix = part.matrix;
      args.up = part.up;
      kernel.store(args, std::max<std::int64_t>(0, begin) * kernel.entry_group,
                   std::min(end * kernel.entry_group, part.entries), memory, out);
    }
    begin -= groups;
    end -= groups;
  }
}

}  // namespace

std::int64_t rows_per_pass(const ProjectKernel& kernel, std::int64_t rows) {
  const std::int64_t passes = std::max<std::int64_t>(1, ceil_div(rows, kRowBlock));
  return ceil_div(ceil_div(rows, passes), kernel.row_tile) * kernel.row_tile;
}

void pack_rows(const ProjectKernel& kernel, const ProjectArgs& args) {
  const std::int64_t tile = kernel.row_tile;
  const std::int64_t grain = ceil_div(kPackGrain, tile * std::max<std::int64_t>(1, args.depth));
  parallel_for(ceil_div(args.rows, tile), grain, [&](std::int64_t begin, std::int64_t end) {
    kernel.pack(args, begin * tile, std::min(end * tile, args.rows));
  });
}

bool gates(Compute compute, std::int64_t rows) {
  const KernelTable& table = kernels();
  return compute == Compute::bfloat16 && table.bf16_project != nullptr && table.bf16_project->gates &&
         rows > table.bf16_project->row_tile;
}

void matmul(const RowsIn& x, std::int64_t rows, std::int64_t depth, std::span<const MatmulPart> parts,
            Compute compute) {
  const ProjectKernel& kernel = kernel_for(compute, depth);
  const std::int64_t block = rows_per_pass(kernel, rows), group = kernel.entry_group;
  std::int64_t groups = 0;
  for (const MatmulPart& part : parts) groups += ceil_div(part.entries, group);
  thread_local Scratch packed;
  for (std::int64_t row = 0; row < rows; row += block) {
    const std::int64_t count = std::min(block, rows - row);
    ProjectArgs args{{static_cast<const float*>(x.data) + row * x.stride, x.dtype, x.stride},
                     count,
                     depth,
                     packed.reserve(kernel.packed_bytes(count, depth)),
                     {}};
    pack_rows(kernel, args);
    const std::int64_t work = std::max<std::int64_t>(1, group * count * depth);
    parallel_for(groups, ceil_div(kRunGrain, work),
                 [&](std::int64_t begin, std::int64_t end) { store_groups(kernel, args, parts, row, begin, end); });
  }
}

}  // namespace qtale::cpu

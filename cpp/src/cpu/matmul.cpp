// The product of x with a matrix that is not quantized, over all threads.
#include <algorithm>

#include "core/text.h"
#include "cpu/backend.h"
#include "cpu/isa.h"
#include "cpu/project.h"
#include "cpu/scratch.h"
#include "qtale/decoder_ops.h"
#include "qtale/parallel.h"

namespace qtale::cpu {
namespace {

constexpr std::int64_t kPackGrain = 65536;  // elements of x worth a second thread
constexpr std::int64_t kRunGrain = 65536;   // multiply-adds worth a second thread: few rows wait for memory

const ProjectKernel& bf16_kernel(const char* op, std::int64_t in_features, bool tiled) {
  const KernelTable& table = kernels();
  if (table.bf16_project == nullptr)
    fail_input("{}: {} has no products of bfloat16 numbers (AVX-512 BF16 has); compute in float.", op, table.name);
  if (in_features % 2 != 0)
    fail_input("{}: bfloat16 numbers are multiplied by pairs, but there are {} features; compute in float.", op,
               in_features);
  if (tiled && !table.bf16_project->tiles)
    fail_input("{}: {} reads no weights that lie in tiles (AMX does); give them in rows.", op, table.name);
  return *table.bf16_project;
}

const ProjectKernel& kernel_for(const DenseProduct& p, Compute compute) {
  const bool rounded = p.x.dtype == DType::bf16;
  if (compute != Compute::bfloat16) {
    if (p.tiled)
      fail_input("matmul: weights in tiles are for compute bfloat16; give them in rows to compute otherwise.");
    if (rounded) fail_input("matmul: x in bfloat16 is for compute bfloat16; give it in float32 to compute otherwise.");
    return kernels().project;
  }
  const ProjectKernel& kernel = bf16_kernel("matmul", p.depth, p.tiled);
  if (rounded && !kernel.tiles)
    fail_input("matmul: {} takes no x in bfloat16 (AMX does); give it in float32.", kernels().name);
  return kernel;
}

}  // namespace

void pack_rows(const ProjectKernel& kernel, const ProjectArgs& args) {
  const std::int64_t tile = kernel.row_tile;
  const std::int64_t grain = ceil_div(kPackGrain, tile * std::max<std::int64_t>(1, args.depth));
  parallel_for(ceil_div(args.rows, tile), grain, [&](std::int64_t begin, std::int64_t end) {
    kernel.pack(args, begin * tile, std::min(end * tile, args.rows));
  });
}

bool has_fused_products(Compute compute, std::int64_t rows) {
  const KernelTable& table = kernels();
  return compute == Compute::bfloat16 && table.bf16_project != nullptr && table.bf16_project->tiles &&
         rows > table.bf16_project->row_tile;
}

void matmul(const DenseProduct& p, Compute compute) {
  const ProjectKernel& kernel = kernel_for(p, compute);
  const std::int64_t group = kernel.entry_group;
  thread_local Scratch packed;
  for_passes(kernel, p.rows, [&](std::int64_t row, std::int64_t count) {
    const RowsIn x{static_cast<const std::byte*>(p.x.data) + row * p.x.stride * size_of(p.x.dtype), p.x.dtype,
                   p.x.stride};
    const ProjectArgs args{x,        count, p.depth, packed.reserve(kernel.packed_bytes(count, p.depth)),
                           p.matrix, p.up,  p.tiled};
    ProjectOut to = p.out;
    if (to.rounded != nullptr) to.rounded += row * to.stride;
    if (to.y != nullptr) to.y += row * to.stride;
    pack_rows(kernel, args);
    const std::int64_t work = std::max<std::int64_t>(1, group * count * p.depth);
    parallel_for(ceil_div(p.entries, group), ceil_div(kRunGrain, work), [&](std::int64_t first, std::int64_t last) {
      thread_local Scratch scratch;
      kernel.store(args, first * group, std::min(last * group, p.entries), scratch.reserve(kernel.scratch_bytes(count)),
                   to);
    });
  });
}

void round_weights(const RoundArgs& args, std::int64_t entries) {
  constexpr std::int64_t kTile = kTileOutputs, kGrain = 1 << 16;
  const ProjectKernel& kernel = bf16_kernel("round_weights", args.depth, args.tiled);
  parallel_for(ceil_div(entries, kTile), ceil_div(kGrain, kTile * std::max<std::int64_t>(1, args.depth)),
               [&](std::int64_t first, std::int64_t last) {
                 kernel.round(args, first * kTile, std::min(last * kTile, entries));
               });
}

}  // namespace qtale::cpu

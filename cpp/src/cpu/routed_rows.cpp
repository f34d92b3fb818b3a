// compact_rows and scatter_add_rows over all threads.
#include <algorithm>

#include "cpu/backend.h"
#include "cpu/isa.h"
#include "qtale/parallel.h"

namespace qtale::cpu {
namespace {

constexpr std::int64_t kGrain = 32768;  // elements worth a second thread

std::int64_t rows_per_task(std::int64_t size) {
  return std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, size));
}

}  // namespace

void compact_rows(const CompactArgs& args, std::int64_t count) {
  const KernelTable& table = kernels();
  parallel_for(count, rows_per_task(args.size),
               [&](std::int64_t begin, std::int64_t end) { table.compact_rows(args, begin, end); });
}

void scatter_add_rows(const ScatterArgs& args, std::int64_t count) {
  const KernelTable& table = kernels();
  parallel_for(count, rows_per_task(args.size),
               [&](std::int64_t begin, std::int64_t end) { table.scatter_add_rows(args, begin, end); });
}

}  // namespace qtale::cpu

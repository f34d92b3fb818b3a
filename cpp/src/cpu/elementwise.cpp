// quantize, dequantize and fake_quantize over all threads.
#include <algorithm>
#include <atomic>

#include "core/text.h"
#include "cpu/backend.h"
#include "cpu/isa.h"
#include "qtale/parallel.h"

namespace qtale::cpu {
namespace {

// Elements below which waking the threads costs more than it brings.
constexpr std::int64_t kGrain = 32768;

std::int64_t rows_per_task(std::int64_t in_features) {
  return std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, in_features));
}

}  // namespace

void quantize(const QuantizeArgs& args, std::int64_t rows) {
  std::atomic<std::int64_t> bad{-1};
  const KernelTable& table = kernels();
  parallel_for(rows, rows_per_task(args.in_features), [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t row = table.quantize(args, begin, end);
    if (row >= 0) bad = row;
  });
  if (bad >= 0)
    fail_input(
        "quantize: output row {} of the weight holds NaN, infinity or values whose scale overflows {}; "
        "repair the weights or store the scales as float32.",
        bad.load(), name_of(args.scale_dtype));
}

void dequantize(const DequantizeArgs& args, std::int64_t rows) {
  const KernelTable& table = kernels();
  parallel_for(rows, rows_per_task(args.in_features),
               [&](std::int64_t begin, std::int64_t end) { table.dequantize(args, begin, end); });
}

void fake_quantize(const FakeQuantizeArgs& args, std::int64_t rows) {
  const KernelTable& table = kernels();
  parallel_for(rows, rows_per_task(args.in_features),
               [&](std::int64_t begin, std::int64_t end) { table.fake_quantize(args, begin, end); });
}

}  // namespace qtale::cpu

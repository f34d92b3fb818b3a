// rms_norm, rope, silu_mul and kv_append over all threads.
#include "cpu/decoder.h"

#include <algorithm>
#include <cmath>

#include "cpu/isa.h"
#include "qtale/parallel.h"

namespace qtale::cpu {
namespace {

// Elements below which waking the threads costs more than it brings.
constexpr std::int64_t kGrain = 32768;

std::int64_t rows_per_task(std::int64_t elements) {
  return std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, elements));
}

}  // namespace

void rms_norm(const NormArgs& args, std::int64_t rows) {
  const DecoderKernels& table = *kernels().decoder;
  parallel_for(rows, rows_per_task(args.heads * args.n),
               [&](std::int64_t begin, std::int64_t end) { table.rms_norm(args, begin, end); });
}

void rope(const RopeArgs& args, std::int64_t rows) {
  const DecoderKernels& table = *kernels().decoder;
  parallel_for(rows, rows_per_task(args.heads * args.half * 2),
               [&](std::int64_t begin, std::int64_t end) { table.rope(args, begin, end); });
}

void silu_mul(const SiluArgs& args, std::int64_t rows) {
  const DecoderKernels& table = *kernels().decoder;
  parallel_for(rows, rows_per_task(4 * args.n),
               [&](std::int64_t begin, std::int64_t end) { table.silu_mul(args, begin, end); });
}

void log_softmax_at(const SoftmaxArgs& args, std::int64_t count) {
  const DecoderKernels& table = *kernels().decoder;
  parallel_for(count, rows_per_task(4 * args.vocab), [&](std::int64_t begin, std::int64_t end) {
    ExpSum last{};
    for (std::int64_t i = begin; i < end; ++i) {
      const float* x = args.logits + args.rows[i] * args.stride;
      // Targets of one row are neighbours.
      if (i == begin || args.rows[i] != args.rows[i - 1]) last = table.exp_sum(x, args.vocab);
      const float value = x[args.targets[i]];
      const double distance = static_cast<double>(value) - static_cast<double>(last.top);
      args.log_probs[i] = static_cast<float>(distance - std::log(last.sum));
      args.greedy[i] = value == last.top && std::find(x, x + args.targets[i], value) == x + args.targets[i];
    }
  });
}

void kv_append(const AppendArgs& args) {
  if (args.rows == 0) return;
  const DecoderKernels& table = *kernels().decoder;
  const std::int64_t last = (args.first + args.rows - 1) / kPageTokens;
  const std::int64_t units = (last - args.first / kPageTokens + 1) * args.kv_heads;
  parallel_for(units, rows_per_task(std::min(args.rows, kPageTokens) * args.head_dim * 4),
               [&](std::int64_t begin, std::int64_t end) {
                 (args.dtype == DType::s8 ? table.rounded.append_int8_keys : table.kv_append)(args, begin, end);
               });
}

}  // namespace qtale::cpu

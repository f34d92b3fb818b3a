// rms_norm, rope, silu_mul and kv_append over all threads.
#include "cpu/decoder.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/isa.h"
#include "qtale/parallel.h"

namespace qtale::cpu {
namespace {

// Elements below which waking the threads costs more than it brings.
constexpr std::int64_t kGrain = 32768;

std::int64_t rows_per_task(std::int64_t elements) {
  return std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, elements));
}

// Logits of -inf weigh nothing; their distance from the largest is no number where that is -inf as well.
ExpSum exp_sum(const DecoderKernels& table, const float* x, std::int64_t count) {
  const ExpSum part = table.exp_sum(x, count);
  const bool weighs = part.top != -std::numeric_limits<float>::infinity() ||
                      std::any_of(x, x + count, [](float value) { return std::isnan(value); });
  return weighs ? part : ExpSum{part.top, 0.0};
}

void add_part(const ExpSum& part, TargetLogit& to) {
  if (part.sum == 0.0) return;
  const double distance = static_cast<double>(part.top) - static_cast<double>(to.top);
  if (distance > 0.0) {
    to.sum = part.sum + to.sum * std::exp(-distance);
    to.top = part.top;
  } else {
    to.sum += part.sum * std::exp(distance);
  }
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

void add_logits(const SoftmaxArgs& args, std::span<TargetLogit> state) {
  const DecoderKernels& table = *kernels().decoder;
  parallel_for(std::ssize(state), rows_per_task(4 * args.count), [&](std::int64_t begin, std::int64_t end) {
    ExpSum part{};
    const std::int32_t* row = nullptr;
    for (std::int64_t i = begin; i < end; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const float* x = args.logits + args.rows[at] * args.stride;
      // Targets of one row are neighbours.
      if (row == nullptr || *row != args.rows[at]) part = exp_sum(table, x, args.count);
      row = &args.rows[at];
      TargetLogit& target = state[at];
      const std::int64_t place = args.targets[at] - args.first;
      if (place >= 0 && place < args.count) {
        target.value = x[place];
        target.is_first = target.value == part.top && (args.first == 0 || target.value > target.top) &&
                          std::find(x, x + place, target.value) == x + place;
      }
      add_part(part, target);
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

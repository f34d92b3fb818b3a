// Scalar kernels of the weight solvers, one row and one column at a time: their specification and oracle.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "core/half.h"
#include "cpu/solve.h"

namespace qtale::cpu {
namespace {

void sums(const float* panel, const float* entries, std::int64_t steps, float* out) {
  float sum = 0.0f;
  for (std::int64_t k = 0; k < steps; ++k) sum += entries[k] * panel[k];
  *out = sum;
}

void load(const float* weight, std::int64_t, std::int64_t rows, std::int64_t columns, const std::int32_t* position,
          float* panel) {
  for (std::int64_t c = 0; c < columns; ++c) panel[position[c]] = rows > 0 ? weight[c] : 0.0f;
}

float stored_scale(float wanted, DType dtype) {
  float scale = wanted, tiny = FLT_EPSILON;
  if (dtype == DType::f16) scale = f16_to_float(float_to_f16(wanted)), tiny = 0x1p-10f;
  if (dtype == DType::bf16) scale = bf16_to_float(float_to_bf16(wanted)), tiny = 0x1p-7f;
  return scale < FLT_MIN ? tiny : scale;
}

struct Grid {
  float scale, zero;
};

// code - zero
float nearest(float w, const Grid& grid, int num_bits) {
  const float half = static_cast<float>(1 << (num_bits - 1));
  return std::clamp(std::nearbyint(w * (1.0f / grid.scale)), -half - grid.zero, half - 1.0f - grid.zero);
}

Grid choose(const GridRule& rule, float lo, float hi) {
  const float levels = static_cast<float>((1 << rule.num_bits) - 1),
              half = static_cast<float>(1 << (rule.num_bits - 1));
  const float wanted = rule.symmetric ? std::max(-lo, hi) / (levels * 0.5f) : (hi - lo) / levels;
  Grid grid{stored_scale(wanted, rule.scale_dtype), 0.0f};
  if (!rule.symmetric) grid.zero = std::clamp(std::nearbyint(-half - lo * (1.0f / grid.scale)), -half, half - 1.0f);
  return grid;
}

float error_of(const GridRule& rule, const Importance& importance, const float* columns, std::int64_t count,
               const Grid& grid, float* d) {
  float total = 0.0f;
  for (std::int64_t i = 0; i < count; ++i) {
    d[i] = columns[i] - nearest(columns[i], grid, rule.num_bits) * grid.scale;
    float weighed = importance.diagonal ? d[i] * importance.diagonal[i] : d[i];
    if (importance.form) sums(d, importance.form + i * count, i + 1, &weighed);
    total += d[i] * weighed;
  }
  return total;
}

void grid(const GridRule& rule, const Importance& importance, const float* columns, std::int64_t count, float*,
          float* out) {
  float lo = 0.0f, hi = 0.0f, least = 0.0f;
  std::vector<float> d(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    lo = std::min(lo, columns[i]);
    hi = std::max(hi, columns[i]);
  }
  for (int step = 0; step < rule.steps; ++step) {
    Grid found = choose(rule, lo * rule.factor(step), hi * rule.factor(step));
    for (int sign = 0; sign <= static_cast<int>(rule.both_signs); ++sign, found.scale = -found.scale) {
      const float error = error_of(rule, importance, columns, count, found, d.data());
      if (step + sign > 0 && !(error < least)) continue;
      least = error;
      out[kScale] = found.scale;
      out[kInverse] = 1.0f / found.scale;
      out[kZero] = found.zero;
    }
  }
}

void advance(const ColumnBlock& b, float* work) {
  for (std::int64_t c = b.begin; c < b.end; ++c) {
    float sum = 0.0f;
    sums(work, b.packed + (c - b.begin) * b.tile_stride, b.begin, &sum);
    work[c] += sum;
  }
}

Grid grid_of(const ColumnBlock& b, const PanelState& s, std::int64_t column) {
  const float* grid = s.grids + b.group_of[column] * kGridRows;
  return {grid[kScale], grid[kZero]};
}

void gptq(const ColumnBlock& b, std::int64_t fresh, const PanelState& s) {
  *s.totals = 0.0f;
  for (std::int64_t c = b.begin; c < b.end; ++c) {
    float sum = 0.0f;
    sums(s.work + fresh, b.packed + (c - b.begin) * b.tile_stride + fresh, c - fresh, &sum);
    const float w = s.work[c] + sum;
    const Grid grid = grid_of(b, s, c);
    const float level = nearest(w, grid, b.num_bits);
    s.codes[b.order[c]] = static_cast<std::int8_t>(level + grid.zero);
    s.work[c] = (level * grid.scale - w) * b.inverse_diagonal[c];
    *s.totals += s.work[c] * s.work[c];
  }
}

void refine(const ColumnBlock& b, std::int64_t columns, const PanelState& s) {
  constexpr float kReluctance = 1.0f - 0x1p-9f;
  const float half = static_cast<float>(1 << (b.num_bits - 1));
  *s.totals = 0.0f;
  for (std::int64_t c = b.begin; c < b.end; ++c) {
    float gradient = 0.0f;
    sums(s.work, b.packed + (c - b.begin) * b.tile_stride, columns, &gradient);
    const Grid grid = grid_of(b, s, c);
    const float before = s.codes[b.order[c]];
    const float wanted = gradient * (b.inverse_diagonal[c] * kReluctance) * (1.0f / grid.scale);
    const float after = std::clamp(std::nearbyint(before + wanted), -half, half - 1.0f);
    s.codes[b.order[c]] = static_cast<std::int8_t>(after);
    s.work[c] -= (after - before) * grid.scale;
    *s.totals += after != before ? 1.0f : 0.0f;
  }
}

void form(const ColumnBlock& b, const float* panel, float* totals) {
  *totals = 0.0f;
  for (std::int64_t c = b.begin; c < b.end; ++c) {
    float sum = 0.0f;
    sums(panel, b.packed + (c - b.begin) * b.tile_stride, c + 1, &sum);
    *totals += sum * panel[c];
  }
}

void rounding(const GridRule& rule, const float* factor, std::int64_t count, float* scratch, float* columns) {
  float found[kGridRows];
  for (std::int64_t i = 0; i < count; ++i) scratch[i] = columns[i] * factor[i];
  grid(rule, {}, scratch, count, nullptr, found);
  for (std::int64_t i = 0; i < count; ++i) {
    const float level = nearest(scratch[i], {found[kScale], found[kZero]}, rule.num_bits);
    columns[i] = level * found[kScale] * (1.0f / factor[i]) - columns[i];
  }
}

// The largest of (the sum of the k largest magnitudes - step) / k (Duchi et al. 2008).
float threshold_of(const float* v, std::int64_t n, float step) {
  std::vector<float> sorted(static_cast<std::size_t>(n));
  std::transform(v, v + n, sorted.begin(), [](float x) { return std::fabs(x); });
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  double sum = 0.0, threshold = 0.0;
  for (std::size_t k = 0; k < sorted.size(); ++k) {
    sum += static_cast<double>(sorted[k]);
    threshold = std::max(threshold, (sum - static_cast<double>(step)) / static_cast<double>(k + 1));
  }
  return static_cast<float>(threshold);
}

std::int64_t prox(const ProxArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    const float* v = a.values + r * a.stride;
    if (!std::all_of(v, v + a.in_features, [](float x) { return std::isfinite(x); })) return r;
    for (std::int64_t k = 0; k < a.in_features; k += a.group_size) {
      const float t = threshold_of(v + k, a.group_size, a.step);
      for (std::int64_t i = k; i < k + a.group_size; ++i) {
        const float clipped = std::clamp(v[i], -t, t);
        a.out[r * a.in_features + i] = a.project ? v[i] - clipped : clipped;
      }
    }
  }
  return -1;
}

}  // namespace

const SolveKernels reference_solve_table = {1, 1, sums, load, grid, advance, gptq, refine, form, rounding, prox};

}  // namespace qtale::cpu

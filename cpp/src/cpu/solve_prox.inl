// prox_linf and the projection on the l1 ball. Both come from the threshold t with sum_i max(|v_i| - t, 0) = step.
#pragma once

#include "cpu/solve_tile.inl"

namespace qtale::cpu::solving {
namespace {

inline VecF magnitude(VecF v) { return sub(set1(0.0f), negated_abs(v)); }

// Calls fn(|v|) for vectors of |v|; lanes past the end are 0.
template <class Fn>
inline void for_magnitudes(const float* v, std::int64_t n, Fn&& fn) {
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) fn(magnitude(load_f32(v + i)));
  if (i < n) fn(magnitude(load_part<F32>(v + i, n - i)));
}

struct Excess {
  double sum;  // of |v_i| - t over those above t
  std::int64_t count;
};

inline Excess excess_over(const float* v, std::int64_t n, float t) {
  constexpr std::int64_t kStretch = 4096;  // values of one float32 sum
  const VecF threshold = set1(t), zero = set1(0.0f);
  Excess out{0.0, 0};
  for (std::int64_t begin = 0; begin < n; begin += kStretch) {
    VecF sum = zero;
    for_magnitudes(v + begin, min64(kStretch, n - begin), [&](VecF a) {
      sum = add(sum, max(sub(a, threshold), zero));
      out.count += __builtin_popcount(not_le(a, threshold));
    });
    out.sum += static_cast<double>(reduce_add(sum));
  }
  return out;
}

// Newton's steps from below rise to the root of a convex, piecewise linear function and end after finitely many.
inline float find_threshold(const float* v, std::int64_t n, float step) {
  constexpr int kMaxSteps = 64;
  VecF largest = set1(0.0f);
  for_magnitudes(v, n, [&](VecF a) { largest = max(largest, a); });
  const float top = reduce_max(largest);
  float t = top - step;
  if (t < 0.0f) t = 0.0f;
  for (int i = 0; i < kMaxSteps; ++i) {
    const Excess excess = excess_over(v, n, t);
    if (excess.count == 0 || excess.sum <= static_cast<double>(step)) break;
    const auto rise = (excess.sum - static_cast<double>(step)) / static_cast<double>(excess.count);
    const float next = static_cast<float>(static_cast<double>(t) + rise);
    if (!(next > t)) break;
    t = next;
  }
  return t;
}

inline bool all_finite(const float* v, std::int64_t n) {
  VecI largest = zero_bits();
  for_magnitudes(v, n, [&](VecF a) { largest = max_bits(largest, abs_bits(a)); });
  return reduce_max_bits(largest) < 0x7f800000u;
}

inline void apply_threshold(const ProxArgs& a, const float* v, float t, float* out) {
  const VecF high = set1(t), low = set1(-t);
  const auto result = [&](VecF x) {
    const VecF clipped = min(max(x, low), high);
    return a.project ? sub(x, clipped) : clipped;
  };
  std::int64_t i = 0;
  for (; i + kWidth <= a.group_size; i += kWidth) store_f32(out + i, result(load_f32(v + i)));
  if (i < a.group_size) store_part<F32>(out + i, result(load_part<F32>(v + i, a.group_size - i)), a.group_size - i);
}

std::int64_t prox_rows(const ProxArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    const float* v = a.values + r * a.stride;
    if (!all_finite(v, a.in_features)) return r;
    for (std::int64_t k = 0; k < a.in_features; k += a.group_size)
      apply_threshold(a, v + k, find_threshold(v + k, a.group_size, a.step), a.out + r * a.in_features + k);
  }
  return -1;
}

// One table from what was written once.
template <int Tile, int Vecs>
constexpr SolveKernels kernels = {
    Vecs * kWidth,
    Tile,
    tile_sums<Tile, Vecs>,
    load_panel<Vecs * kWidth>,
    find_grid<Tile, Vecs>,
    advance_columns<Tile, Vecs>,
    gptq_columns<Tile, Vecs>,
    refine_columns<Tile, Vecs>,
    half_form<Tile, Vecs>,
    round_columns<Tile, Vecs>,
    prox_rows,
};

}  // namespace
}  // namespace qtale::cpu::solving

// Softmax as it goes along (Milakov & Gimelshein, 2018), in base 2: what a query keeps between chunks of entries.
#pragma once

#include <cfloat>
#include <limits>

#include "core/integers.h"
#include "cpu/attention_tile.inl"
#include "cpu/exp.inl"

namespace qtale::cpu::attending {
namespace {

// Entries of a chunk that a query sees.
struct Range {
  std::int32_t begin, end;
  bool operator==(const Range&) const = default;
  bool all(std::int64_t chunk = kChunk) const { return begin == 0 && end == chunk; }
};

// Of each query the largest score so far, the sum of 2^(score - largest) in lanes, and the values weighted by it.
// Queries that saw nothing yet have the lowest number, so that a difference of two of them is no NaN. There is room for
// queries up to a multiple of 16, and for a vector of tops that begins at any of them.
struct State {
  float* tops;    // [queries]
  float* totals;  // [queries, kWidth]
  float* sums;    // [queries, stride]
  std::int64_t stride;

  State(std::byte* memory, std::int64_t queries, std::int64_t head_dim)
      : tops(reinterpret_cast<float*>(memory)),
        totals(tops + round_up(queries + kWidth, 16)),
        sums(totals + round_up(queries, 16) * kWidth),
        stride(round_up(head_dim, kWidth)) {}
  static std::size_t bytes(std::int64_t queries, std::int64_t head_dim) {
    const std::int64_t floats =
        round_up(queries + kWidth, 16) + round_up(queries, 16) * (kWidth + round_up(head_dim, kWidth));
    return static_cast<std::size_t>(floats) * sizeof(float);
  }
  void clear(std::int64_t queries) const {
    for (std::int64_t i = 0; i < queries; ++i) tops[i] = -FLT_MAX;
    for (std::int64_t i = 0; i < queries * kWidth; i += kWidth) store_f32(totals + i, set1(0.0f));
    for (std::int64_t i = 0; i < queries * stride; i += kWidth) store_f32(sums + i, set1(0.0f));
  }
};

constexpr int kMaxQueries = 16;  // of a tile

// a with the lanes of vector p that a query does not see replaced.
inline VecF keep_seen(VecF a, const Range& range, int p, VecF other) {
  const auto lane = [&](int entry) {
    const int at = entry - p * kWidth;
    return at < 0 ? 0 : at > kWidth ? kWidth : at;
  };
  return keep_lanes(a, lane(range.begin), lane(range.end), other);
}

// Scores of a query with those it does not see at -inf.
template <int Vecs = kVecs>
inline void load_scores(const float* scores, const Range& range, VecF* out) {
  unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { out[p] = load_f32(scores + p * kWidth); });
  if (range.all(Vecs * kWidth)) return;
  const VecF never = set1(-std::numeric_limits<float>::infinity());
  for (int p = 0; p < Vecs; ++p) out[p] = keep_seen(out[p], range, p, never);
}

// Turns the scores of a tile into weights, updates tops and totals, and gives the factors that the sums so far need.
inline void weigh(float* scores, int queries, const Range* ranges, float* tops, float* totals, float* factors) {
  alignas(64) float drops[kMaxQueries] = {};
  for (int i = 0; i < queries; ++i) {
    VecF x[kVecs];
    load_scores(scores + i * kChunk, ranges[i], x);
    const float top = reduce_max(max(max(x[0], x[1]), max(x[2], x[3])));
    const float before = tops[i];
    tops[i] = top > before ? top : before;
    drops[i] = before - tops[i];
  }
  for (int i = 0; i < queries; i += kWidth) store_f32(drops + i, exp2_down(load_f32(drops + i)));
  for (int i = 0; i < queries; ++i) {
    VecF x[kVecs];
    float* const row = scores + i * kChunk;
    load_scores(row, ranges[i], x);
    const VecF top = set1(tops[i]);
    unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA {
      x[p] = exp2_down(sub(x[p], top));
      store_f32(row + p * kWidth, x[p]);
    });
    const VecF total = add(add(x[0], x[1]), add(x[2], x[3]));
    store_f32(totals + i * kWidth, multiply_add(load_f32(totals + i * kWidth), set1(drops[i]), total));
    factors[i] = drops[i];
  }
}

// Adds to a state what later entries gave.
inline void merge_states(const State& into, const State& later, std::int64_t queries) {
  for (std::int64_t i = 0; i < queries; ++i) {
    const float before = into.tops[i], after = later.tops[i];
    const float top = after > before ? after : before;
    const VecF keep = exp2_down(set1(before - top)), take = exp2_down(set1(after - top));
    into.tops[i] = top;
    const auto blend = [&](float* a, const float* b) {
      VecF sum = mul(load_f32(a), keep);
      accumulate(sum, load_f32(b), take);
      store_f32(a, sum);
    };
    blend(into.totals + i * kWidth, later.totals + i * kWidth);
    for (std::int64_t d = 0; d < into.stride; d += kWidth)
      blend(into.sums + i * into.stride + d, later.sums + i * into.stride + d);
  }
}

}  // namespace
}  // namespace qtale::cpu::attending

// Softmax of the scores that tiles of keys gave, 16 queries of a chunk at a time.
#pragma once

#include "cpu/attention_amx_workspace.inl"

namespace qtale::cpu::attending {
namespace {

// Queries of a tile that wait to be weighed.
struct Unweighed16 {
  const std::byte* scores;  // [queries, kChunk]
  const float* factors;     // [queries]
  const float* const* key_scales;
  const Range* ranges;
  float* tops;             // [queries]
  float* totals;           // [queries, kWidth]
  float* sums;             // [queries, stride]
  std::uint16_t* weights;  // [queries, kChunk]
  std::int64_t stride;
  std::int64_t rows;
  std::int64_t weighed;  // the first of those that wait
};

// Scores less the top, of one query. Codes are worth what their sums are times both scales.
template <bool Int8>
QTALE_INLINE void subtract_top(const VecF (&values)[kVecs], VecF factor, VecF top, VecF (&x)[kVecs]) {
  unroll<kVecs>(
      [&](auto p) QTALE_INLINE_LAMBDA { x[p] = Int8 ? _mm512_fmsub_ps(values[p], factor, top) : sub(values[p], top); });
}

inline void hide_lanes(const Range& range, VecF (&x)[kVecs]) {
  alignas(64) float lanes[kChunk];
  unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA { store_f32(lanes + p * kWidth, x[p]); });
  load_scores(lanes, range, x);
}

QTALE_INLINE VecF most_of(const VecF (&x)[kVecs]) { return max(max(x[0], x[1]), max(x[2], x[3])); }

// Out of line: it is rare, and its registers are in the way.
__attribute__((noipa)) void raise_query(const Unweighed16& u, std::int64_t row, float most) {
  raise_to(most, u.tops[row], u.totals + row * kWidth, u.sums + row * u.stride, u.stride);
}

// Lanes of half a chunk, of bf16, that are within a range.
inline __mmask32 lanes_seen(const Range& range, std::int32_t first) {
  const auto below = [&](std::int32_t entry) {
    const std::int32_t lane = entry - first;
    return lane <= 0 ? 0u : lane >= 32 ? ~0u : (1u << lane) - 1u;
  };
  return below(range.end) & ~below(range.begin);
}

// Weighs a query. What it does not see weighs nothing.
template <bool Int8, bool Whole>
QTALE_INLINE void weigh_query(const Unweighed16& u, std::int64_t row) {
  VecF values[kVecs], x[kVecs];
  unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA {
    const std::byte* from = u.scores + row * kChunk * 4 + p * kTileLine;
    values[p] = Int8 ? mul(_mm512_cvtepi32_ps(_mm512_load_si512(from)), load_f32(u.key_scales[p]))
                     : load_f32(reinterpret_cast<const float*>(from));
  });
  const auto less = [&](float top) QTALE_INLINE_LAMBDA {
    subtract_top<Int8>(values, set1(Int8 ? u.factors[row] : 1.0f), set1(top), x);
    if constexpr (!Whole) hide_lanes(u.ranges[row], x);
  };
  less(u.tops[row] - kExp2Offset);
  if (not_le(most_of(x), set1(kSlack)) != 0) [[unlikely]] {
    less(0.0f);
    raise_query(u, row, reduce_max(most_of(x)));
    less(u.tops[row] - kExp2Offset);
  }
  unroll<2>([&](auto half) QTALE_INLINE_LAMBDA {
    const VecF first = exp2_rounded(x[2 * half], &kExp2), second = exp2_rounded(x[2 * half + 1], &kExp2);
    auto rounded = reinterpret_cast<VecI>(_mm512_cvtne2ps_pbh(second, first));
    if constexpr (!Whole) rounded = _mm512_maskz_mov_epi16(lanes_seen(u.ranges[row], half * 32), rounded);
    _mm512_store_si512(u.weights + row * kChunk + half * 32, rounded);
  });
}

template <bool Int8, bool Whole>
__attribute__((noipa)) void weigh_queries(const Unweighed16& u, std::int64_t row, std::int64_t end) {
#pragma GCC unroll 1
  for (; row < end; ++row) weigh_query<Int8, Whole>(u, row);
}

}  // namespace
}  // namespace qtale::cpu::attending

// Softmax as it goes along, giving weights in bf16. They sum to what they are rounded to, so that rounding shifts no
// mean of values.
#pragma once

#include "cpu/attention_bf16_pairs.inl"

namespace qtale::cpu::attending {
namespace {

// Scores may be so much larger than what they are compared with, and that is so much larger than the largest one that
// was there when it was raised. So what was summed before is rarely rescaled.
constexpr float kSlack = 32.0f, kReserve = 16.0f;

// What is added to an exponent before it is turned into a power: 2^r for |r| <= 1/32 is a line through -kExp2Offset.
// A top that is less by so much adds it without an operation.
constexpr float kExp2Offset = 1.4375f;

// 2^(j / 16) times the slope of that line, less the bits that j leaves where the whole number joins the exponent.
struct Exp2Table {
  alignas(64) std::uint32_t powers[16] = {0x3f321d65, 0x3f320029, 0x3f323c4f, 0x3f32d5cb, 0x3f33d0be, 0x3f35317b,
                                          0x3f36fc81, 0x3f393686, 0x3f3be474, 0x3f3b85b6, 0x3f395865, 0x3f376d15,
                                          0x3f35c6af, 0x3f346843, 0x3f3354fe, 0x3f329037};
  float lowest = kExp2Offset - 100.0f;   // of a weight that no sum notices: numbers that are not normal are slow
  float bias = 786432.0f - kExp2Offset;  // 1.5 * 2^19: a sum with it is rounded to 16ths
  float whole_bias = 786432.0f;
  std::uint32_t ones = 0x3f803f80;
};
inline constexpr Exp2Table kExp2;

// 2^(x - kExp2Offset) for x <= 100 within 2^-12.5, which bf16 does not tell from exact. One multiplication, because
// others wait for the units that multiply.
QTALE_INLINE VecF exp2_rounded(VecF x, const Exp2Table* table) {
  const VecF kept = max(set1(table->lowest), x);  // NaN stays
  const VecF biased = add(kept, set1(table->bias));
  const VecF rest = sub(kept, sub(biased, set1(table->whole_bias)));
  const __m512i bits = _mm512_castps_si512(biased);
  const __m512i power = _mm512_permutexvar_epi32(bits, _mm512_load_si512(table->powers));
  return mul(_mm512_castsi512_ps(_mm512_add_epi32(power, _mm512_slli_epi32(bits, 19))), rest);
}

// Weights of two vectors of scores of a query. The first is complete before the second begins: beside the sums of a
// tile there are registers for one.
QTALE_INLINE void weigh_half(const float* scores, float top, float* total, std::uint16_t* weights,
                             const Exp2Table* table) {
  VecF first = exp2_rounded(sub(load_f32(scores), set1(top - kExp2Offset)), table);
  asm volatile("" : "+v"(first) : : "memory");
  const VecF second = exp2_rounded(sub(load_f32(scores + kWidth), set1(top - kExp2Offset)), table);
  const Pairs rounded = _mm512_cvtne2ps_pbh(second, first);
  _mm512_storeu_si512(weights, reinterpret_cast<__m512i>(rounded));
  VecF sum = load_f32(total);
  accumulate_pairs(sum, rounded, reinterpret_cast<Pairs>(_mm512_set1_epi32(static_cast<int>(table->ones))));
  store_f32(total, sum);
}

// Scores of queries that wait to be turned into weights, half a chunk of a query at a time.
struct Unweighed {
  const float* scores;     // [queries, kChunk]
  const float* tops;       // [queries]
  float* totals;           // [queries, kWidth]
  std::uint16_t* weights;  // [queries, kChunk]
  std::int64_t halves;     // that wait
  const Exp2Table* table;
};
constexpr std::int64_t kHalfChunk = kChunk / 2;

QTALE_INLINE void weigh_next(Unweighed& u) {
  weigh_half(u.scores, *u.tops, u.totals, u.weights, u.table);
  const std::int64_t done = u.halves & 1;  // halves come in pairs: the second completes a query
  u.scores += kHalfChunk;
  u.weights += kHalfChunk;
  u.tops += done;
  u.totals += done * kWidth;
  --u.halves;
}

inline void weigh_all(Unweighed& u) {
  while (u.halves > 0) weigh_next(u);
}

// Whether a score rises above what `top` bears.
QTALE_INLINE bool above(VecF most, float top) { return not_le(most, add(set1(top), set1(kSlack))) != 0; }

// Hides what the queries of a tile do not see.
inline void hide(float* scores, std::int64_t queries, const Range* ranges) {
  for (std::int64_t i = 0; i < queries; ++i, scores += kChunk) {
    if (ranges[i].all()) continue;
    VecF x[kVecs];
    load_scores(scores, ranges[i], x);
    unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA { store_f32(scores + p * kWidth, x[p]); });
  }
}

// Raises a top to what its largest score wants, and rescales what was summed so far.
inline void raise_to(float most, float& top, float* total, float* sums, std::int64_t stride) {
  const float before = top, wanted = most + kReserve;
  top = wanted > before ? wanted : before;
  if (before == -FLT_MAX) return;  // what saw nothing yet has sums of zero
  const VecF factor = exp2_down(set1(before - top));
  store_f32(total, mul(load_f32(total), factor));
  for (std::int64_t d = 0; d < stride; d += kWidth) store_f32(sums + d, mul(load_f32(sums + d), factor));
}

// Raises the top of a query where its scores need it, and rescales what was summed so far.
inline void raise_top(const float* scores, float& top, float* total, float* sums, std::int64_t stride) {
  const auto at = [&](int p) { return load_f32(scores + p * kWidth); };
  const VecF most = max(max(at(0), at(1)), max(at(2), at(3)));
  if (above(most, top)) raise_to(reduce_max(most), top, total, sums, stride);
}

}  // namespace
}  // namespace qtale::cpu::attending

// Softmax as it goes along, giving weights in bf16. They sum to what they are rounded to, so that rounding shifts no
// mean of values.
#pragma once

#include "cpu/attention_bf16_tile.inl"

namespace qtale::cpu::attending {
namespace {

// A score may be so much larger than what it is compared with: rescaling what was summed before is rare then.
constexpr float kSlack = 8.0f;

// 2^x for x <= 100 within 2^-13, which bf16 does not tell from exact. Nothing is below 2^-100, a weight that no sum
// notices: numbers that are not normal are slow.
QTALE_INLINE VecF exp2_rounded(VecF x) {
  const VecF kept = max(set1(-100.0f), x);  // NaN stays
  const VecF biased = add(kept, set1(kBias));
  const VecF f = sub(kept, sub(biased, set1(kBias)));
  VecF sum = set1(0.0551716723f);
  for (const float coefficient : {0.242611125f, 0.693260968f, 0.999928057f})
    sum = multiply_add(sum, f, set1(coefficient));
  return mul(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(biased), 23)));
}

// Turns the scores of a tile into weights [queries][kChunk] as weigh() does.
inline void weigh_rounded(const float* scores, int queries, const Range* ranges, float* tops, float* totals,
                          float* factors, std::uint16_t* weights) {
  const auto one = reinterpret_cast<Pairs>(_mm512_set1_epi32(0x3f803f80));
  for (int i = 0; i < queries; ++i) {
    VecF x[kVecs];
    load_scores(scores + i * kChunk, ranges[i], x);
    const VecF most = max(max(x[0], x[1]), max(x[2], x[3]));
    VecF total = load_f32(totals + i * kWidth);
    factors[i] = 1.0f;
    if (not_le(most, set1(tops[i] + kSlack)) != 0) {
      const float before = tops[i], top = reduce_max(most);
      tops[i] = top > before ? top : before;
      // What saw nothing yet has sums of zero, which no factor changes.
      if (before > -FLT_MAX) {
        const VecF factor = exp2_down(set1(before - tops[i]));
        factors[i] = _mm512_cvtss_f32(factor);
        total = mul(total, factor);
      }
    }
    const VecF top = set1(tops[i]);
    unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA { x[p] = exp2_rounded(sub(x[p], top)); });
    const Pairs first = _mm512_cvtne2ps_pbh(x[1], x[0]), second = _mm512_cvtne2ps_pbh(x[3], x[2]);
    _mm512_storeu_si512(weights + i * kChunk, reinterpret_cast<__m512i>(first));
    _mm512_storeu_si512(weights + i * kChunk + kLine, reinterpret_cast<__m512i>(second));
    accumulate_pairs(total, first, one);
    accumulate_pairs(total, second, one);
    store_f32(totals + i * kWidth, total);
  }
}

}  // namespace
}  // namespace qtale::cpu::attending

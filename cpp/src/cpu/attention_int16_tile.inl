// The two products of attention in integers of 16 bits on AVX2, two of each in a lane: pairs of dimensions in the
// first, pairs of entries in the second.
#pragma once

#include <immintrin.h>

#include "cpu/attention_workspace.inl"

namespace qtale::cpu::attending {
namespace {

constexpr int kCodedChunk = 64;  // entries: what ends a step costs as much for fewer
constexpr int kCodedVecs = kCodedChunk / kWidth;

// Largest codes of finite numbers. No sum of kMaxHeadDim products of the first two or of kCodedChunk products of the
// last two leaves 32 bits.
constexpr float kQueryTop = 2047.0f, kKeyTop = 4095.0f, kWeightTop = 16383.0f, kValueTop = 2047.0f;
static_assert(std::int64_t{2047} * 4095 * kMaxHeadDim <= INT32_MAX);
static_assert(std::int64_t{16383} * 2047 * kCodedChunk <= INT32_MAX);

constexpr int kTileRows = 6;  // twelve sums leave room for two vectors, a broadcast and a product
constexpr std::int64_t kCodeStride = kMaxHeadDim + 32;  // codes from query to query: an odd number of lines

// sum0, sum1 += vectors times the pair at `factor`. One statement, because g++ 12 loads all broadcasts first and
// spills.
QTALE_INLINE void multiply_pair(__m256i& sum0, __m256i& sum1, __m256i v0, __m256i v1, const std::int16_t* factor) {
  __m256i b, t;
  const auto& pair = *reinterpret_cast<const std::int16_t (*)[2]>(factor);
  asm volatile(
      "vpbroadcastd %[pair], %[b]\n\tvpmaddwd %[b], %[v0], %[t]\n\tvpmaddwd %[b], %[v1], %[b]\n\t"
      "vpaddd %[t], %[sum0], %[sum0]\n\tvpaddd %[b], %[sum1], %[sum1]"
      : [sum0] "+x"(sum0), [sum1] "+x"(sum1), [b] "=&x"(b), [t] "=&x"(t)
      : [v0] "x"(v0), [v1] "x"(v1), [pair] "m"(pair));
}

// sums [Rows][2] of `count` pairs: factors [Rows][stride], vectors from `vectors` on, `step` numbers apart.
template <int Rows, std::int64_t Stride>
QTALE_INLINE void multiply_pairs(__m256i (&sums)[Rows][2], const std::int16_t* factors, const std::int16_t* vectors,
                                 std::int64_t step, std::int64_t count) {
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA { sums[r][0] = sums[r][1] = _mm256_setzero_si256(); });
#pragma GCC unroll 1
  for (; count > 0; --count, factors += 2, vectors += step) {
    const __m256i v0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(vectors));
    const __m256i v1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(vectors + 16));
    unroll<Rows>([&](auto r)
                     QTALE_INLINE_LAMBDA { multiply_pair(sums[r][0], sums[r][1], v0, v1, factors + r * Stride); });
  }
  asm volatile("" ::: "memory");
}

// scores [Rows][kCodedChunk] of the first `vecs` vectors of entries, or one more: queries [Rows][kCodeStride], keys
// [depth / 2][kCodedChunk] pairs.
template <int Rows>
__attribute__((noipa)) void pair_scores(const std::int16_t* queries, const float* query_scales,
                                        const std::int16_t* keys, const float* key_scales, std::int64_t depth, int vecs,
                                        float* scores) {
  for (; vecs > 0; vecs -= 2, keys += 4 * kWidth, key_scales += 2 * kWidth, scores += 2 * kWidth) {
    __m256i sums[Rows][2];
    multiply_pairs<Rows, kCodeStride>(sums, queries, keys, 2 * kCodedChunk, depth / 2);
    unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
      unroll<2>([&](auto p) QTALE_INLINE_LAMBDA {
        const VecF scale = mul(load_f32(key_scales + p * kWidth), set1(query_scales[r]));
        store_f32(scores + r * kCodedChunk + p * kWidth, mul(_mm256_cvtepi32_ps(sums[r][p]), scale));
      });
    });
  }
}

// `Vecs` vectors of dimensions of pair_values, of two that are multiplied.
template <int Rows, int Vecs>
QTALE_INLINE void pair_columns(const std::int16_t* weights, const float* scales, const float* factors,
                               const std::int16_t* values, std::int64_t pairs, float* out, std::int64_t stride) {
  __m256i sums[Rows][2];
  multiply_pairs<Rows, kCodedChunk>(sums, weights, values, 2 * stride, pairs);
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    const VecF factor = set1(factors[r]), scale = set1(scales[r]);
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA {
      float* const to = out + r * stride + p * kWidth;
      store_f32(to, multiply_add(_mm256_cvtepi32_ps(sums[r][p]), scale, mul(load_f32(to), factor)));
    });
  });
}

// out [Rows][stride] = factors * out + scales * (weights [Rows][kCodedChunk] times values [pairs][stride] pairs).
template <int Rows>
__attribute__((noipa)) void pair_values(const std::int16_t* weights, const float* scales, const float* factors,
                                        const std::int16_t* values, std::int64_t pairs, float* out,
                                        std::int64_t stride) {
  std::int64_t left = stride;
  for (; left >= 2 * kWidth; left -= 2 * kWidth, values += 4 * kWidth, out += 2 * kWidth)
    pair_columns<Rows, 2>(weights, scales, factors, values, pairs, out, stride);
  if (left > 0) pair_columns<Rows, 1>(weights, scales, factors, values, pairs, out, stride);
}

using PairScores = void (*)(const std::int16_t*, const float*, const std::int16_t*, const float*, std::int64_t, int,
                            float*);
using PairValues = void (*)(const std::int16_t*, const float*, const float*, const std::int16_t*, std::int64_t, float*,
                            std::int64_t);
// By number of queries less one.
constexpr PairScores kPairScores[kTileRows] = {pair_scores<1>, pair_scores<2>, pair_scores<3>,
                                               pair_scores<4>, pair_scores<5>, pair_scores<6>};
constexpr PairValues kPairValues[kTileRows] = {pair_values<1>, pair_values<2>, pair_values<3>,
                                               pair_values<4>, pair_values<5>, pair_values<6>};

// What is smaller has codes of zero: its scale would have no inverse.
constexpr float kLeastCoded = 1e-30f;
constexpr float kFarApart = 16.0f;  // what scales of values may lie apart before they cost weights their last bits

// Numbers as codes of up to `top`, and what a code is worth: NaN where one is not finite, so that codes do not matter.
struct CodeScale {
  VecF scale, inverse;
};
QTALE_INLINE CodeScale code_scale(VecI amax_bits, float top) {
  const VecF amax = _mm256_castsi256_ps(amax_bits);
  const VecF wild = _mm256_cmp_ps(amax, set1(FLT_MAX), _CMP_NLE_UQ);
  const VecF used = _mm256_andnot_ps(wild, _mm256_cmp_ps(amax, set1(kLeastCoded), _CMP_GE_OQ));
  return {_mm256_or_ps(wild, _mm256_and_ps(used, mul(amax, set1(1.0f / top)))),
          _mm256_and_ps(used, div(set1(top), amax))};
}

// The largest of each row of v [kWidth][kWidth].
inline VecF reduce_max_each(const float* v) {
  const auto halves = [&](int a, int b) {
    const VecF x = load_f32(v + a * kWidth), y = load_f32(v + b * kWidth);
    return max(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee));
  };
  const auto four = [&](int r) {
    const VecF a = halves(r, r + 1), b = halves(r + 2, r + 3);
    return max(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
  };
  const VecF low = four(0), high = four(4);
  return max(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

// 2^x for x <= 0 within 3e-6 of it, a twentieth of what a weight's code resolves; 0 where that is no normal float.
inline VecF exp2_coded(VecF x) {
  const VecF biased = add(x, set1(kBias));
  const VecF f = sub(x, sub(biased, set1(kBias)));
  VecF sum = set1(9.58285309e-3f);
  for (const float coefficient : {5.59064246e-2f, 2.40240986e-1f, 6.93124193e-1f, 1.0f})
    sum = multiply_add(sum, f, set1(coefficient));
  return scale_down(sum, biased, x);
}

// a in the lower halves of 32-bit lanes, b in the upper ones; numbers that are not finite are coded as zero.
QTALE_INLINE __m256i code_pairs(VecF a, VecF b) {
  return _mm256_blend_epi16(_mm256_cvtps_epi32(a), _mm256_slli_epi32(_mm256_cvtps_epi32(b), 16), 0xaa);
}

}  // namespace
}  // namespace qtale::cpu::attending

// Queries and keys as 8-bit codes. A Hadamard matrix turns both, which keeps their products and spreads what is large
// in a few dimensions over all (Ashkboos et al., 2024): then 8 bits lose about as little as bf16. AVX-512.
#pragma once

#include "cpu/activations.inl"
#include "cpu/kv_entries.inl"
#include "cpu/unroll.h"

namespace qtale::cpu {
namespace {

// Lanes a with their partner b, whose number differs in the bit `Step`: a + b in the lower one, a - b in the upper one.
template <int Step>
QTALE_INLINE VecF add_partners(VecF x) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const VecF partners = _mm512_permutexvar_ps(_mm512_xor_si512(lanes, _mm512_set1_epi32(Step)), x);
  const __mmask16 upper = _mm512_test_epi32_mask(lanes, _mm512_set1_epi32(Step));
  return _mm512_mask_sub_ps(add(x, partners), upper, partners, x);
}

// Pairs of registers whose numbers differ in the bit `Step`, in the same way.
template <int Step, int Vecs>
QTALE_INLINE void add_pairs(VecF (&x)[Vecs]) {
  unroll<Vecs>([&](auto i) QTALE_INLINE_LAMBDA {
    if constexpr ((i & Step) == 0) {
      const VecF low = x[i], high = x[i + Step];
      x[i] = add(low, high);
      x[i + Step] = sub(low, high);
    }
  });
  if constexpr (2 * Step < Vecs) add_pairs<2 * Step>(x);
}

// Numbers times the Hadamard matrix of Sylvester, whose rows have the length sqrt(depth).
template <int Vecs>
inline void rotate(const float* from, float* to) {
  VecF x[Vecs];
  unroll<Vecs>([&](auto i) QTALE_INLINE_LAMBDA {
    x[i] = add_partners<8>(add_partners<4>(add_partners<2>(add_partners<1>(load_f32(from + i * kWidth)))));
  });
  if constexpr (Vecs > 1) add_pairs<1>(x);
  unroll<Vecs>([&](auto i) QTALE_INLINE_LAMBDA { store_f32(to + i * kWidth, x[i]); });
}

// Codes of the rotated numbers as int8 activations have them, and their sum; returns what one of them is worth.
inline float round_rotated(const float* from, std::int64_t depth, std::int8_t* codes, std::int32_t& sum) {
  alignas(64) float rotated[kMaxHeadDim];
  switch (depth / kWidth) {
    case 1: rotate<1>(from, rotated); break;
    case 2: rotate<2>(from, rotated); break;
    case 4: rotate<4>(from, rotated); break;
    case 8: rotate<8>(from, rotated); break;
    default: rotate<16>(from, rotated);
  }
  return quantize_activation_group<F32>(rotated, depth, depth, depth, codes, &sum);
}

// Codes of four dimensions of a key lie together, those of the next key beside them.
inline void append_int8_keys(const AppendArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t depth = a.head_dim, scales_at = kPageTokens * depth, values_at = kv_values_at(depth, a.dtype);
  for_entries(a, begin, end, [&](std::byte* part, std::int64_t slot, std::int64_t row, std::int64_t head) {
    alignas(64) std::int8_t codes[kMaxHeadDim];
    std::int32_t sum;
    reinterpret_cast<float*>(part + scales_at)[slot] = round_rotated(a.k.at(row, head), depth, codes, sum);
    for (std::int64_t d = 0; d < depth; d += 4) {
      std::uint32_t four;
      __builtin_memcpy(&four, codes + d, sizeof four);
      four ^= 0x80808080u;  // adds kKeyOffset to each
      __builtin_memcpy(part + d * kPageTokens + 4 * slot, &four, sizeof four);
    }
    auto* values = reinterpret_cast<std::uint16_t*>(part + values_at) + slot * depth;
    for (std::int64_t d = 0; d < depth; d += kWidth) store_f16(values + d, load_f32(a.v.at(row, head) + d));
  });
}

}  // namespace
}  // namespace qtale::cpu

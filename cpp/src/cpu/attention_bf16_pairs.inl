// Pairs of bf16 numbers, of which a multiplication sums both products.
#pragma once

#include "cpu/attention_block.inl"
#include "cpu/vec_avx512_bf16.h"

namespace qtale::cpu::attending {
namespace {

constexpr std::int64_t kLine = 2 * kWidth;                 // bf16 numbers of a vector of pairs
constexpr std::int64_t kRoundedStride = kMaxHeadDim + 32;  // numbers from query to query: no two of a tile share a set
constexpr std::int64_t kKeyStep = kVecs * kLine;           // numbers of a pair of dimensions in a chunk's keys

QTALE_INLINE Pairs load_pairs(const std::uint16_t* p) { return reinterpret_cast<Pairs>(_mm512_loadu_si512(p)); }
QTALE_INLINE Pairs broadcast_pair(const std::uint16_t* p) {
  std::int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return reinterpret_cast<Pairs>(_mm512_set1_epi32(pair));
}

// Numbers of two rows side by side, those of the first in the low halves.
QTALE_INLINE Pairs pairs_of(VecF low, VecF high) {
  alignas(64) static constexpr std::uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  return reinterpret_cast<Pairs>(_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
}
QTALE_INLINE void store_pairs(std::uint16_t* p, VecF low, VecF high) {
  _mm512_storeu_si512(p, reinterpret_cast<__m512i>(pairs_of(low, high)));
}

// The keys of a page to pairs, those of two dimensions `step` numbers behind those of the two before.
template <class E>
__attribute__((noipa)) void pair_keys(const typename E::T* from, std::int64_t depth, std::uint16_t* to,
                                      std::int64_t step) {
  for (std::int64_t d = 0; d < depth; d += 2, from += 2 * kPageTokens, to += step)
    store_pairs(to, E::load(from), E::load(from + kPageTokens));
}

// The values of a page to pairs [kPageTokens / 2][stride].
template <class E>
__attribute__((noipa)) void pair_values(const typename E::T* from, std::int64_t depth, std::int64_t stride,
                                        std::uint16_t* to) {
  for (std::int64_t j = 0; j < kPageTokens; j += 2, from += 2 * depth, to += 2 * stride) {
    std::int64_t i = 0;
    for (; i + kWidth <= depth; i += kWidth) store_pairs(to + 2 * i, E::load(from + i), E::load(from + depth + i));
    if (i < depth)
      store_pairs(to + 2 * i, load_part<E>(from + i, depth - i), load_part<E>(from + depth + i, depth - i));
  }
}

}  // namespace
}  // namespace qtale::cpu::attending

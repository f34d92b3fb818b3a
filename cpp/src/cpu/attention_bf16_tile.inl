// The two products of attention on AVX-512 BF16. Pairs of dimensions of a key, and of entries of the values, lie in the
// 32-bit lanes of which a multiplication sums both products; what belongs to a query is a broadcast pair.
#pragma once

#include "cpu/attention_block.inl"
#include "cpu/vec_avx512_bf16.h"

namespace qtale::cpu::attending {
namespace {

constexpr std::int64_t kLine = 2 * kWidth;         // bf16 numbers of a vector of pairs
constexpr std::int64_t kRoundedStride = 256 + 32;  // numbers from query to query: no two of a tile share a set
constexpr std::int64_t kKeyStep = kVecs * kLine;   // numbers of a pair of dimensions in a chunk's keys

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

// The keys of a page to pairs [depth / 2][kKeyStep / 2]; `next` is the page that is needed one chunk later.
template <class E>
__attribute__((noipa)) void pair_keys(const typename E::T* from, const typename E::T* next, std::int64_t depth,
                                      std::uint16_t* to) {
  for (std::int64_t d = 0; d < depth; d += 2, to += kKeyStep) {
    const std::int64_t at = d * kPageTokens;
    __builtin_prefetch(next + at);
    if (sizeof(typename E::T) == 4) __builtin_prefetch(next + at + kPageTokens);
    store_pairs(to, E::load(from + at), E::load(from + at + kPageTokens));
  }
}

// The values of a page to pairs [kPageTokens / 2][stride].
template <class E>
__attribute__((noipa)) void pair_values(const typename E::T* from, const typename E::T* next, std::int64_t depth,
                                        std::int64_t stride, std::uint16_t* to) {
  for (std::int64_t j = 0; j < kPageTokens; j += 2, from += 2 * depth, next += 2 * depth, to += 2 * stride) {
    for (std::int64_t i = 0; i < 2 * depth; i += 64 / static_cast<std::int64_t>(sizeof(typename E::T)))
      __builtin_prefetch(next + i);
    std::int64_t i = 0;
    for (; i + kWidth <= depth; i += kWidth) store_pairs(to + 2 * i, E::load(from + i), E::load(from + depth + i));
    if (i < depth)
      store_pairs(to + 2 * i, load_part<E>(from + i, depth - i), load_part<E>(from + depth + i, depth - i));
  }
}

// scores [Rows][kChunk] = queries [Rows][kRoundedStride] times Vecs vectors of keys, which are those of a whole chunk.
template <int Rows, int Vecs>
__attribute__((noipa)) void tile_rounded_scores(const std::uint16_t* queries, const std::uint16_t* keys,
                                                std::int64_t depth, float* scores) {
  VecF acc[Rows][Vecs];
  unroll<Rows>([&](auto r)
                   QTALE_INLINE_LAMBDA { unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { acc[r][p] = set1(0.0f); }); });
#pragma GCC unroll 1
  for (std::int64_t d = 0; d < depth; d += 2, keys += kKeyStep) {
    Pairs key[Vecs];
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { key[p] = load_pairs(keys + p * kLine); });
    unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
      const Pairs query = broadcast_pair(queries + r * kRoundedStride + d);
      unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { accumulate_pairs(acc[r][p], query, key[p]); });
    });
  }
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { store_f32(scores + r * kChunk + p * kWidth, acc[r][p]); });
  });
}

// out [Rows][stride] = factors * out + weights [Rows][kChunk] times so many pairs of values [pairs][stride], for Vecs
// vectors of dimensions.
template <int Rows, int Vecs>
__attribute__((noipa)) void tile_rounded_values(const std::uint16_t* weights, const std::uint16_t* values,
                                                std::int64_t pairs, const float* factors, float* out,
                                                std::int64_t stride) {
  VecF acc[Rows][Vecs];
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    const VecF factor = set1(factors[r]);
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { acc[r][p] = mul(load_f32(out + r * stride + p * kWidth), factor); });
  });
#pragma GCC unroll 1
  for (; pairs > 0; --pairs, weights += 2, values += 2 * stride) {
    Pairs value[Vecs];
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { value[p] = load_pairs(values + p * kLine); });
    unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
      const Pairs weight = broadcast_pair(weights + r * kChunk);
      unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { accumulate_pairs(acc[r][p], weight, value[p]); });
    });
  }
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { store_f32(out + r * stride + p * kWidth, acc[r][p]); });
  });
}

// The same products, bit for bit, for so few rows that keys and values are read where they lie. `next` is what the next
// chunk will read.
template <class E, int Rows>
__attribute__((noipa)) void tile_direct_scores(const std::uint16_t* queries, const typename E::T* const* keys,
                                               const typename E::T* const* next, std::int64_t depth, float* scores) {
  VecF acc[Rows][kVecs];
  unroll<Rows>([&](auto r)
                   QTALE_INLINE_LAMBDA { unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA { acc[r][p] = set1(0.0f); }); });
  const typename E::T *from[kVecs], *later[kVecs];
  unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA { from[p] = keys[p]; });
  unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA { later[p] = next[p]; });
#pragma GCC unroll 1
  for (std::int64_t d = 0; d < depth; d += 2) {
    Pairs key[kVecs];
    unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA {
      const std::int64_t at = d * kPageTokens;
      key[p] = pairs_of(E::load(from[p] + at), E::load(from[p] + at + kPageTokens));
      __builtin_prefetch(later[p] + at);
      if (sizeof(typename E::T) == 4) __builtin_prefetch(later[p] + at + kPageTokens);
    });
    unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
      const Pairs query = broadcast_pair(queries + r * kRoundedStride + d);
      unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA { accumulate_pairs(acc[r][p], query, key[p]); });
    });
  }
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA { store_f32(scores + r * kChunk + p * kWidth, acc[r][p]); });
  });
}

template <class E, int Rows, int Vecs>
__attribute__((noipa)) void tile_direct_values(const std::uint16_t* weights, const typename E::T* values,
                                               const typename E::T* next, std::int64_t pairs, std::int64_t depth,
                                               const float* factors, float* out) {
  VecF acc[Rows][Vecs];
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    const VecF factor = set1(factors[r]);
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { acc[r][p] = mul(load_f32(out + r * depth + p * kWidth), factor); });
  });
#pragma GCC unroll 1
  for (; pairs > 0; --pairs, weights += 2, values += 2 * depth, next += 2 * depth) {
    Pairs value[Vecs];
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA {
      value[p] = pairs_of(E::load(values + p * kWidth), E::load(values + depth + p * kWidth));
      __builtin_prefetch(next + p * kWidth);
      __builtin_prefetch(next + depth + p * kWidth);
    });
    unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
      const Pairs weight = broadcast_pair(weights + r * kChunk);
      unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { accumulate_pairs(acc[r][p], weight, value[p]); });
    });
  }
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { store_f32(out + r * depth + p * kWidth, acc[r][p]); });
  });
}

using RoundedScoresTile = void (*)(const std::uint16_t*, const std::uint16_t*, std::int64_t, float*);
using RoundedValuesTile = void (*)(const std::uint16_t*, const std::uint16_t*, std::int64_t, const float*, float*,
                                   std::int64_t);
constexpr int kRoundedRows = 6;  // of a tile

template <int Vecs, int... Rows>
constexpr auto rounded_scores_tiles(std::integer_sequence<int, Rows...>) {
  return Tiles<RoundedScoresTile, sizeof...(Rows)>{{tile_rounded_scores<Rows + 1, Vecs>...}};
}
template <int Vecs, int... Rows>
constexpr auto rounded_values_tiles(std::integer_sequence<int, Rows...>) {
  return Tiles<RoundedValuesTile, sizeof...(Rows)>{{tile_rounded_values<Rows + 1, Vecs>...}};
}
template <int Vecs>
constexpr auto kRoundedScores = rounded_scores_tiles<Vecs>(std::make_integer_sequence<int, kRoundedRows>{});
template <int Vecs>
constexpr auto kRoundedValues = rounded_values_tiles<Vecs>(std::make_integer_sequence<int, kRoundedRows>{});

constexpr int kDirectRows = 4;  // leave registers to make pairs in

template <class E>
using DirectScoresTile = void (*)(const std::uint16_t*, const typename E::T* const*, const typename E::T* const*,
                                  std::int64_t, float*);
template <class E>
using DirectValuesTile = void (*)(const std::uint16_t*, const typename E::T*, const typename E::T*, std::int64_t,
                                  std::int64_t, const float*, float*);

template <class E, int... Rows>
constexpr auto direct_scores_tiles(std::integer_sequence<int, Rows...>) {
  return Tiles<DirectScoresTile<E>, sizeof...(Rows)>{{tile_direct_scores<E, Rows + 1>...}};
}
template <class E, int Vecs, int... Rows>
constexpr auto direct_values_tiles(std::integer_sequence<int, Rows...>) {
  return Tiles<DirectValuesTile<E>, sizeof...(Rows)>{{tile_direct_values<E, Rows + 1, Vecs>...}};
}
template <class E>
constexpr auto kDirectScores = direct_scores_tiles<E>(std::make_integer_sequence<int, kDirectRows>{});
template <class E, int Vecs>
constexpr auto kDirectValues = direct_values_tiles<E, Vecs>(std::make_integer_sequence<int, kDirectRows>{});

}  // namespace
}  // namespace qtale::cpu::attending

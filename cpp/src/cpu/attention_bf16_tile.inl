// The two products of attention on AVX-512 BF16. Pairs of dimensions of a key, and of entries of the values, lie in the
// 32-bit lanes of which a multiplication sums both products; what belongs to a query is a broadcast pair.
#pragma once

#include "cpu/attention_bf16_softmax.inl"

namespace qtale::cpu::attending {
namespace {

template <int Rows, int Vecs>
QTALE_INLINE void clear(VecF (&acc)[Rows][Vecs]) {
  unroll<Rows>([&](auto r)
                   QTALE_INLINE_LAMBDA { unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { acc[r][p] = set1(0.0f); }); });
}

// acc += a pair of each row, which lie `stride` apart, times vectors of pairs.
template <int Rows, int Vecs>
QTALE_INLINE void multiply_pairs(VecF (&acc)[Rows][Vecs], const std::uint16_t* rows, std::int64_t stride,
                                 const Pairs (&vectors)[Vecs]) {
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    const Pairs row = broadcast_pair(rows + r * stride);
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { accumulate_pairs(acc[r][p], row, vectors[p]); });
  });
}
template <int Rows, int Vecs>
QTALE_INLINE void multiply_pairs(VecF (&acc)[Rows][Vecs], const std::uint16_t* rows, std::int64_t stride,
                                 const std::uint16_t* from) {
  Pairs vectors[Vecs];
  unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { vectors[p] = load_pairs(from + p * kLine); });
  multiply_pairs(acc, rows, stride, vectors);
}

// What is there comes last: nothing waits for it.
template <int Rows, int Vecs>
QTALE_INLINE void add_to(float* out, std::int64_t stride, const VecF (&acc)[Rows][Vecs]) {
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA {
      float* const to = out + r * stride + p * kWidth;
      store_f32(to, add(acc[r][p], load_f32(to)));
    });
  });
}

// scores [Rows][kChunk] = queries [Rows][kRoundedStride] times Vecs vectors of keys, which are those of a whole chunk.
// Returns a bit for each query whose scores rise above what its top bears.
template <int Rows, int Vecs>
__attribute__((noipa)) unsigned tile_rounded_scores(const std::uint16_t* queries, const std::uint16_t* keys,
                                                    std::int64_t depth, const float* tops, float* scores) {
  VecF acc[Rows][Vecs];
  clear(acc);
#pragma GCC unroll 1
  for (; depth > 0; depth -= 2, keys += kKeyStep, queries += 2) multiply_pairs(acc, queries, kRoundedStride, keys);
  unsigned raised = 0;
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    VecF most = acc[r][0];
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA {
      most = max(most, acc[r][p]);
      store_f32(scores + r * kChunk + p * kWidth, acc[r][p]);
    });
    raised |= static_cast<unsigned>(above(most, tops[r])) << r;
  });
  return raised;
}

// out [Rows][stride] += weights [Rows][kChunk] times so many pairs of values [pairs][stride], for Vecs vectors of
// dimensions. Meanwhile scores of other queries are weighed, as far as there are steps: with hardly anything to
// multiply, that needs little more time than the products alone.
template <int Rows, int Vecs>
__attribute__((noipa)) void tile_rounded_values(const std::uint16_t* weights, const std::uint16_t* values,
                                                std::int64_t pairs, float* out, std::int64_t stride,
                                                Unweighed& others) {
  VecF acc[Rows][Vecs];
  clear(acc);
  const auto step = [&]() QTALE_INLINE_LAMBDA {
    multiply_pairs(acc, weights, kChunk, values);
    weights += 2;
    values += 2 * stride;
  };
  Unweighed u = others;
  const std::int64_t both = min64(pairs / 2, u.halves);
#pragma GCC unroll 1
  for (std::int64_t i = 0; i < both; ++i) {
    step();
    asm volatile("" : : : "memory");
    step();
    // Constants stay in memory, and nothing is loaded before its time: sums need the registers.
    asm volatile("" : "+r"(u.table) : : "memory");
    weigh_next(u);
    asm volatile("" : : : "memory");
  }
  others = u;
#pragma GCC unroll 1
  for (std::int64_t i = 2 * both; i < pairs; ++i) step();
  add_to(out, stride, acc);
}

// The same products, bit for bit, for so few rows that keys and values are read where they lie. `next` is what the next
// chunk will read.
template <class E, int Rows>
__attribute__((noipa)) void tile_direct_scores(const std::uint16_t* queries, const typename E::T* const* keys,
                                               const typename E::T* const* next, std::int64_t depth, float* scores) {
  VecF acc[Rows][kVecs];
  clear(acc);
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
    multiply_pairs(acc, queries + d, kRoundedStride, key);
  }
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA { store_f32(scores + r * kChunk + p * kWidth, acc[r][p]); });
  });
}

// Pairs of entries that lie in one page, and those that the next chunk will read.
template <class E>
struct Stretch {
  const typename E::T *values, *next;
  std::int64_t pairs;
};

template <class E, int Rows, int Vecs>
__attribute__((noipa)) void tile_direct_values(const std::uint16_t* weights, const Stretch<E>* stretches,
                                               std::int64_t count, std::int64_t depth, std::int64_t column,
                                               float* out) {
  VecF acc[Rows][Vecs];
  clear(acc);
  for (; count > 0; --count, ++stretches) {
    const auto *values = stretches->values + column, *next = stretches->next + column;
#pragma GCC unroll 1
    for (std::int64_t pairs = stretches->pairs; pairs > 0;
         --pairs, weights += 2, values += 2 * depth, next += 2 * depth) {
      Pairs value[Vecs];
      unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA {
        value[p] = pairs_of(E::load(values + p * kWidth), E::load(values + depth + p * kWidth));
        __builtin_prefetch(next + p * kWidth);
        __builtin_prefetch(next + depth + p * kWidth);
      });
      multiply_pairs(acc, weights, kChunk, value);
    }
  }
  add_to(out + column, depth, acc);
}

using RoundedScoresTile = unsigned (*)(const std::uint16_t*, const std::uint16_t*, std::int64_t, const float*, float*);
using RoundedValuesTile = void (*)(const std::uint16_t*, const std::uint16_t*, std::int64_t, float*, std::int64_t,
                                   Unweighed&);
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
using DirectValuesTile = void (*)(const std::uint16_t*, const Stretch<E>*, std::int64_t, std::int64_t, std::int64_t,
                                  float*);

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

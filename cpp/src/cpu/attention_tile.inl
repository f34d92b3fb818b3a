// The two products of attention for a tile of queries, over the Vec of the including file's instruction set. Lanes are
// entries of the cache in the first and dimensions of the values in the second; what belongs to a query is broadcast.
// Each sum is one chain of fused additions in the order of dimensions or entries, whatever else shares the tile.
#pragma once

#include "cpu/decoder.h"
#include "cpu/elements.inl"
#include "cpu/unroll.h"

namespace qtale::cpu::attending {
namespace {

constexpr int kVecs = 4;                         // vectors of scores of a query
constexpr std::int64_t kChunk = kVecs * kWidth;  // entries that share one step of the softmax
constexpr int kPages = kChunk / kPageTokens;     // of a chunk
constexpr std::int64_t kQueryStride = 256 + 16;  // floats from query to query: no two of a tile share a set

// A chunk of the cache where it lies: the first key of each vector of entries, the first value of each page.
template <class E>
struct Chunk {
  const typename E::T* keys[kVecs];
  const typename E::T* values[kPages];
  std::int64_t value_stride;
};

// Memory that the next chunk will need: a line of each is asked for in each step of a product.
struct Ahead {
  const char* first;
  const char* second;
  std::int64_t step;  // bytes
  QTALE_INLINE void ask() {
    __builtin_prefetch(first);
    __builtin_prefetch(second);
    first += step;
    second += step;
  }
};

// acc += queries x vectors. The fewer of both stay in registers.
template <int Rows, int Vecs, class Query, class Vector>
QTALE_INLINE void multiply_tile(VecF (&acc)[Rows][Vecs], Query query, Vector vector) {
  if constexpr (Rows >= Vecs) {
    VecF v[Vecs];
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { v[p] = vector(p); });
    unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
      const VecF q = query(r);
      unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { accumulate(acc[r][p], q, v[p]); });
    });
  } else {
    VecF q[Rows];
    unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA { q[r] = query(r); });
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA {
      const VecF v = vector(p);
      unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA { accumulate(acc[r][p], q[r], v); });
    });
  }
}

// scores [Rows][kChunk] = queries [Rows][kQueryStride] times Vecs vectors of keys.
template <class E, int Rows, int Vecs>
__attribute__((noipa)) void tile_scores(const float* queries, const typename E::T* const* keys, std::int64_t depth,
                                        Ahead ahead, float* scores) {
  VecF acc[Rows][Vecs];
  unroll<Rows>([&](auto r)
                   QTALE_INLINE_LAMBDA { unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { acc[r][p] = set1(0.0f); }); });
  const typename E::T* from[Vecs];
  unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { from[p] = keys[p]; });
  std::int64_t at = 0;
#pragma GCC unroll 1
  for (std::int64_t d = 0; d < depth; ++d, at += kPageTokens) {
    multiply_tile<Rows, Vecs>(
        acc, [&](int r) QTALE_INLINE_LAMBDA { return set1(queries[r * kQueryStride + d]); },
        [&](int p) QTALE_INLINE_LAMBDA { return E::load(from[p] + at); });
    ahead.ask();
  }
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { store_f32(scores + r * kChunk + p * kWidth, acc[r][p]); });
  });
}

// out [Rows][stride] = factors * out + weights [Rows][kChunk] times the values of entries [begin, end) of a chunk, for
// Vecs vectors of dimensions from `column` on.
template <class E, int Rows, int Vecs>
__attribute__((noipa)) void tile_values(const float* weights, const Chunk<E>& chunk, std::int64_t begin,
                                        std::int64_t end, std::int64_t column, const float* factors, Ahead ahead,
                                        float* out, std::int64_t stride) {
  VecF acc[Rows][Vecs];
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    const VecF factor = set1(factors[r]);
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { acc[r][p] = mul(load_f32(out + r * stride + p * kWidth), factor); });
  });
  const std::int64_t step = chunk.value_stride;
  while (begin < end) {
    const std::int64_t stop = min64(end, (begin / kPageTokens + 1) * kPageTokens);
    const typename E::T* from = chunk.values[begin / kPageTokens] + begin % kPageTokens * step + column;
#pragma GCC unroll 1
    for (; begin < stop; ++begin) {
      multiply_tile<Rows, Vecs>(
          acc, [&](int r) QTALE_INLINE_LAMBDA { return set1(weights[r * kChunk + begin]); },
          [&](int p) QTALE_INLINE_LAMBDA { return E::load(from + p * kWidth); });
      ahead.ask();
      from += step;
    }
  }
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { store_f32(out + r * stride + p * kWidth, acc[r][p]); });
  });
}

template <class E>
using ScoresTile = void (*)(const float*, const typename E::T* const*, std::int64_t, Ahead, float*);
template <class E>
using ValuesTile = void (*)(const float*, const Chunk<E>&, std::int64_t, std::int64_t, std::int64_t, const float*,
                            Ahead, float*, std::int64_t);

// Tiles by number of queries less one.
template <class Tile, int TileRows>
struct Tiles {
  Tile by_rows[TileRows];
};
template <class E, int Vecs, int... Rows>
constexpr auto scores_tiles(std::integer_sequence<int, Rows...>) {
  return Tiles<ScoresTile<E>, sizeof...(Rows)>{{tile_scores<E, Rows + 1, Vecs>...}};
}
template <class E, int Vecs, int... Rows>
constexpr auto values_tiles(std::integer_sequence<int, Rows...>) {
  return Tiles<ValuesTile<E>, sizeof...(Rows)>{{tile_values<E, Rows + 1, Vecs>...}};
}
template <class E, int Vecs, int TileRows>
constexpr auto kScores = scores_tiles<E, Vecs>(std::make_integer_sequence<int, TileRows>{});
template <class E, int Vecs, int TileRows>
constexpr auto kValues = values_tiles<E, Vecs>(std::make_integer_sequence<int, TileRows>{});

}  // namespace
}  // namespace qtale::cpu::attending

// Scores of queries and keys of 8 bits: four products where bf16 has two, and keys are read where they lie. Codes of
// keys are unsigned, so sums begin at what their offset adds, with the other sign.
#pragma once

#include "cpu/attention_bf16_tile.inl"
#include "cpu/int8_keys.inl"

namespace qtale::cpu::attending {
namespace {

constexpr std::int64_t kCodeStride = kMaxHeadDim + 64;  // from query to query: no two of a tile share a set
constexpr std::int64_t kFours = 4 * kPageTokens;        // bytes of four dimensions of a page's keys

// Queries of a block: what is added up for one is worth `factors` times the key's scale, in base 2.
struct CodedQueries {
  std::int8_t* codes;    // [queries, kCodeStride]
  float* factors;        // [queries]
  std::int32_t* starts;  // [queries]

  CodedQueries from(std::int64_t query) const { return {codes + query * kCodeStride, factors + query, starts + query}; }
};

// sum += the four products of each lane, of unsigned with signed numbers. Spelled out for the reason that accumulate()
// is.
QTALE_INLINE void accumulate_fours(VecI& sum, VecI keys, VecI query) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(keys), "v"(query));
}
QTALE_INLINE VecI broadcast_four(const std::int8_t* p) {
  std::int32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return _mm512_set1_epi32(four);
}

// A page belongs to values of float16 as much as to keys.
QTALE_INLINE const std::byte* bytes_of(const F16::T* page) { return reinterpret_cast<const std::byte*>(page); }

// scores [Rows][kChunk] = queries times the keys of Vecs pages. Otherwise like tile_rounded_scores; with Ahead, asks
// for the pages `next`, too.
template <int Rows, int Vecs, bool Ahead>
__attribute__((noipa)) unsigned tile_int8_scores(const CodedQueries& queries, const F16::T* const* pages,
                                                 const F16::T* const* next, std::int64_t depth, const float* tops,
                                                 float* scores) {
  VecI acc[Rows][Vecs];
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { acc[r][p] = _mm512_set1_epi32(queries.starts[r]); });
  });
  const std::int8_t* codes = queries.codes;
  const std::byte *from[Vecs], *later[Vecs];
  unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { from[p] = bytes_of(pages[p]); });
  if constexpr (Ahead) unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { later[p] = bytes_of(next[p]); });
#pragma GCC unroll 1
  for (std::int64_t at = 0; at < kPageTokens * depth; at += kFours, codes += 4) {
    VecI keys[Vecs];
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA {
      keys[p] = _mm512_loadu_si512(from[p] + at);
      if constexpr (Ahead) __builtin_prefetch(later[p] + at);
    });
    unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
      const VecI query = broadcast_four(codes + r * kCodeStride);
      unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { accumulate_fours(acc[r][p], keys[p], query); });
    });
  }
  unsigned raised = 0;
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    const VecF factor = set1(queries.factors[r]);
    VecF most = set1(-FLT_MAX);
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA {
      const VecF scale = load_f32(reinterpret_cast<const float*>(from[p] + kPageTokens * depth));
      const VecF score = mul(mul(_mm512_cvtepi32_ps(acc[r][p]), scale), factor);
      most = max(score, most);
      store_f32(scores + r * kChunk + p * kWidth, score);
    });
    raised |= static_cast<unsigned>(above(most, tops[r])) << r;
  });
  return raised;
}

using Int8ScoresTile = unsigned (*)(const CodedQueries&, const F16::T* const*, const F16::T* const*, std::int64_t,
                                    const float*, float*);

template <int Vecs, bool Ahead, int... Rows>
constexpr auto int8_scores_tiles(std::integer_sequence<int, Rows...>) {
  return Tiles<Int8ScoresTile, sizeof...(Rows)>{{tile_int8_scores<Rows + 1, Vecs, Ahead>...}};
}
template <int Vecs>
constexpr auto kInt8Scores = int8_scores_tiles<Vecs, false>(std::make_integer_sequence<int, kRoundedRows>{});
constexpr auto kDirectInt8Scores = int8_scores_tiles<kVecs, true>(std::make_integer_sequence<int, kDirectRows>{});

}  // namespace
}  // namespace qtale::cpu::attending

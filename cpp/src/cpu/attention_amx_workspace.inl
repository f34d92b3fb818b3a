// Memory that one thread needs for attention on AMX, cut into tiles, and how it is filled with the queries of a block
// and the keys and values of a chunk.
#pragma once

#include <cstring>

#include "cpu/amx.inl"
#include "cpu/attention_bf16_workspace.inl"

namespace qtale::cpu::attending {
namespace {

constexpr std::int64_t kValueSteps = kChunk / 2 / kTileRows;  // tiles of pairs of entries
constexpr std::int64_t kColumn = kValueSteps * kTileNumbers;  // numbers of 16 dimensions of a chunk's values
constexpr std::int64_t kTileWeights = kTileRows * kChunk;     // of 16 queries

constexpr int kSumTiles = 4;  // the first ones: columns of values that are summed at once
constexpr int kTotalTile = 4, kScoreTile = 5, kLeftTile = 6, kRightTile = 7;
constexpr int kNarrowLeftTile = 2, kNarrowRightTile = 3;  // codes of less than a line: such heads have two columns

// A tile that sums weights: its first column is one, the others are zero.
struct OneColumn {
  alignas(64) std::uint16_t numbers[kTileNumbers] = {};
  constexpr OneColumn() {
    for (int line = 0; line < kTileRows; ++line)
      for (int i = 0; i < 2; ++i) numbers[line * kLineNumbers + i] = 0x3f80;
  }
};
constexpr OneColumn kOneColumn;

inline TileShapes attention_shapes(const AttentionArgs& a) {
  TileShapes shapes;
  if (a.dtype == DType::s8 && a.head_dim < kTileLine) {
    shapes.set(kNarrowLeftTile, kTileRows, a.head_dim);
    shapes.set(kNarrowRightTile, a.head_dim / 4, kTileLine);
  }
  return shapes;
}

// Sums in tiles that have not been stored yet.
struct Parked {
  float* sums = nullptr;
  float* totals = nullptr;
  std::int64_t stride = 0;
  int columns = 0;

  template <int Column>
  void store() const {
    if (Column < columns) store_tile_sums<Column>(sums + Column * kWidth, stride * std::int64_t{sizeof(float)});
  }
  void store_totals() const {
    if (totals != nullptr) store_tile_sums<kTotalTile>(totals, kTileLine);
  }
  void store_all() const {
    unroll<kSumTiles>([&](auto c) QTALE_INLINE_LAMBDA { store<c>(); });
    store_totals();
  }
};

// Queries are codes of 8 bits or bf16 numbers, scaled to base 2; their number is rounded up to whole tiles.
struct TileWorkspace {
  std::byte* queries = nullptr;      // [queries, query_bytes]
  float* factors = nullptr;          // [queries]; those of codes, as are the starts
  std::int32_t* starts = nullptr;    // [queries, 16]: what sums begin at
  std::byte* scores = nullptr;       // [2, 16, kChunk] sums of codes, or float: of two tiles of queries in turn
  std::uint16_t* weights = nullptr;  // [2, 16, kChunk]: likewise
  std::uint16_t* keys = nullptr;     // [kPages, padded depth / 2, kLineNumbers], where they are not codes
  std::uint16_t* values = nullptr;   // [stride / 16, kChunk / 2, kLineNumbers]
  std::uint16_t* kept = nullptr;     // the same: what some queries see of them
  float* sums = nullptr;             // [16, stride] of those queries
  float* totals = nullptr;           // [16, kWidth]
  Range* ranges = nullptr;           // [queries]
  std::int64_t query_bytes = 0;
  std::size_t bytes = 0;

  // Of int8 keys or others; without memory, only bytes.
  TileWorkspace(std::byte* memory, std::int64_t count, std::int64_t head_dim, DType dtype) {
    const std::int64_t rows = round_up(count, kTileRows), stride = round_up(head_dim, kWidth);
    const bool codes = dtype == DType::s8;
    query_bytes = codes ? round_up(head_dim, kTileLine) : 2 * round_up(head_dim, kLineNumbers);
    const auto take = [&]<class T>(T*& part, std::int64_t numbers) {
      if (memory != nullptr) part = reinterpret_cast<T*>(memory + bytes);
      bytes += static_cast<std::size_t>(round_up(numbers * std::int64_t{sizeof(T)}, 64));
    };
    take(queries, rows * query_bytes);
    take(factors, rows);
    take(starts, codes ? rows * kWidth : 0);
    take(scores, 2 * kTileWeights * std::int64_t{sizeof(float)});
    take(weights, 2 * kTileWeights);
    take(keys, codes ? 0 : kPages * kPageTokens * query_bytes / 2);
    take(values, stride / kWidth * kColumn);
    take(kept, stride / kWidth * kColumn);
    take(sums, kTileRows * stride);
    take(totals, kTileRows * kWidth);
    take(ranges, rows);
  }
};

inline std::size_t amx_scratch_bytes(const AttentionArgs& a, std::int64_t queries) {
  return TileWorkspace(nullptr, queries, a.head_dim, a.dtype).bytes;
}

inline void prepare_tiles(const AttentionArgs& a, const AttentionBlock& b, std::byte* scratch) {
  const std::int64_t count = b.rows * a.group;
  const TileWorkspace w(scratch, count, a.head_dim, a.dtype);
  for (std::int64_t i = 0; i < count; ++i) {
    const float* from = heads_at(a.q, a, b, i);
    prefetch_head(heads_at(a.q, a, b, min64(i + kHeadsAhead, count - 1)), a.head_dim);
    std::byte* const to = w.queries + i * w.query_bytes;
    if (a.dtype != DType::s8) {
      round_query(a, from, w.query_bytes / 2, reinterpret_cast<std::uint16_t*>(to));
      continue;
    }
    std::int32_t start = 0;
    code_query(a, from, {reinterpret_cast<std::int8_t*>(to), w.factors + i, &start});
    _mm512_store_si512(w.starts + i * kWidth, _mm512_set1_epi32(start));
  }
}

// The keys of a page to pairs [padded / 2][kLineNumbers], with zeros beyond the head.
template <class E>
void keys_to_tiles(const typename E::T* from, std::int64_t depth, std::int64_t padded, std::uint16_t* to) {
  pair_keys<E>(from, depth, to, kLineNumbers);
  std::memset(to + depth / 2 * kLineNumbers, 0, static_cast<std::size_t>((padded - depth) / 2 * kLineNumbers) * 2);
}

// The values of a page to its pairs of a chunk's.
template <class E>
__attribute__((noipa)) void values_to_tiles(const typename E::T* from, std::int64_t depth, std::uint16_t* to) {
  for (std::int64_t j = 0; j < kPageTokens; j += 2, from += 2 * depth, to += kLineNumbers) {
    std::uint16_t* column = to;
    std::int64_t i = 0;
    for (; i + kWidth <= depth; i += kWidth, column += kColumn)
      store_pairs(column, E::load(from + i), E::load(from + depth + i));
    if (i < depth) store_pairs(column, load_part<E>(from + i, depth - i), load_part<E>(from + depth + i, depth - i));
  }
}

// Values of a chunk with zeros in place of entries outside of a range; may be where they were.
inline void keep_entries(const std::uint16_t* from, std::int64_t columns, const Range& range, std::uint16_t* to) {
  for (std::int64_t at = 0; at < columns * kColumn; at += kLineNumbers) {
    const std::int64_t entry = at % kColumn / kLineNumbers * 2;
    const auto within = [&](std::int64_t e) { return range.begin <= e && e < range.end; };
    const __mmask32 kept = (within(entry) ? 0x55555555u : 0u) | (within(entry + 1) ? 0xaaaaaaaau : 0u);
    _mm512_store_si512(to + at, _mm512_maskz_loadu_epi16(kept, from + at));
  }
}

inline void copy_floats(const float* from, std::int64_t count, float* to) {
  std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
}

// Whether values of a chunk are all finite.
inline bool all_finite(const std::uint16_t* values, std::int64_t columns) {
  VecI most = _mm512_setzero_si512();
  for (std::int64_t at = 0; at < columns * kColumn; at += kLineNumbers)
    most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_load_si512(values + at), _mm512_set1_epi16(0x7fff)));
  return _mm512_cmpge_epu16_mask(most, _mm512_set1_epi16(0x7f80)) == 0;
}

}  // namespace
}  // namespace qtale::cpu::attending

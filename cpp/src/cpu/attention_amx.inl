// Attention of a block of queries over one span of the cache on AMX, for 16 queries at once: scores are products of
// tiles of codes or of bf16 numbers, values those of bf16 numbers, and AVX-512 weighs the scores of one tile while the
// values of the one before and the keys of the one after are multiplied. Few queries are multiplied in tiles, too: a
// row has the same sums so.
//
// Tiles and vectors overlap only where they alternate every few operations, and where a tile is stored some time after
// its last product: what waits to be stored is in the way of all other stores.
#pragma once

#include <algorithm>

#include "cpu/attention_amx_softmax.inl"

namespace qtale::cpu::attending {
namespace {

constexpr std::int64_t kTileQueries = 512;  // of a block: they share what is made of keys and values

template <class E, bool Int8Keys>
class TileSpan : BlockSpan<E> {
  using Base = BlockSpan<E>;

 public:
  TileSpan(const AttentionArgs& a, const AttentionBlock& b, std::int64_t begin, std::int64_t end, std::byte* scratch,
           std::byte* state)
      : Base(a, b, begin, end, TileWorkspace(scratch, b.rows * a.group, a.head_dim, a.dtype).ranges, state),
        w_(scratch, count_, a.head_dim, a.dtype) {}

  void run() {
    state_.clear(count_);
    if (begin_ >= end_) return;
    attention_shapes(a_).use();
    for (std::int64_t at = begin_ / kChunk * kChunk; at < end_; at += kChunk) {
      set_ranges(at);
      at_ = at;
      run_chunk();
    }
    release_tiles();
  }

 private:
  // Queries that are weighed one by one, in turn with operations of tiles.
  struct Beside {
    Unweighed16 queries{};
    bool whole = false;  // whether they see all of the chunk; others wait till the end

    QTALE_INLINE void one() {
      if (whole && queries.weighed < queries.rows) weigh_query<Int8Keys, true>(queries, queries.weighed++);
    }
    void rest() {
      if (queries.weighed < queries.rows)
        (whole ? weigh_queries<Int8Keys, true> : weigh_queries<Int8Keys, false>)(queries, queries.weighed,
                                                                                 queries.rows);
    }
  };

  std::int64_t tiles() const { return ceil_div(count_, kTileRows); }
  std::int64_t columns() const { return state_.stride / kWidth; }

  void run_chunk() {
    ahead_ = pages_ahead(at_ + kChunk);
    convert();
    const bool apart = !whole_ && !all_finite(w_.values, columns());
    const auto sees_some = [](const Range& r) { return r.begin < r.end; };
    const auto sees_part = [](const Range& r) { return !r.all(); };
    std::int64_t first = 0, last = tiles();
    while (first < last && !seen_by(first, sees_some)) ++first;
    while (first < last && !seen_by(last - 1, sees_some)) --last;
    if (first == last) return;
    Beside nothing;
    multiply_keys(first, {}, nothing);
    for (std::int64_t tile = first; tile <= last; ++tile) {
      ahead_.ask(ceil_div(ahead_.lines(), last - first));
      Beside beside;
      if (tile < last) beside = {unweighed(tile), !seen_by(tile, sees_part)};
      Parked sums;
      if (tile > first) apart ? add_apart(tile - 1) : add_values(addends(tile - 1), sums, beside);
      tile + 1 < last ? multiply_keys(tile + 1, sums, beside) : sums.store_all();
      beside.rest();
    }
  }

  // Whether what a query of a tile sees of the chunk is as asked.
  template <class Test>
  bool seen_by(std::int64_t tile, Test test) const {
    if (whole_) return test(Range{0, kChunk});
    return std::any_of(ranges_ + tile * kTileRows, ranges_ + min64((tile + 1) * kTileRows, count_), test);
  }

  // Keys and values of the chunk to tiles. Entries before and after the span's are zero: they may be any bits.
  void convert() {
    const std::int64_t depth = a_.head_dim;
    for (int p = 0; p < kPages; ++p) {
      const std::int64_t entry = at_ + p * kPageTokens;
      pages_[p] = page(entry);
      if constexpr (Int8Keys) {
        scales_[p] = reinterpret_cast<const float*>(bytes_of(pages_[p]) + kPageTokens * depth);
      } else {
        keys_to_tiles<E>(pages_[p], depth, w_.query_bytes / 2, w_.keys + p * kPageTokens * w_.query_bytes / 2);
      }
      if (tiles() < kPages) ahead_.ask(ceil_div(ahead_.lines(), kPages));
      values_to_tiles<E>(pages_[p] + values_at_, depth, w_.values + p * kPageTokens / 2 * kLineNumbers);
    }
    const auto within = [&](std::int64_t entry) {
      return static_cast<std::int32_t>(entry < at_ ? 0 : entry > at_ + kChunk ? kChunk : entry - at_);
    };
    const Range seen{within(begin_), within(end_)};
    if (!seen.all()) keep_entries(w_.values, columns(), seen, w_.values);
  }

  // Scores of a tile of queries; in turn with them sums are stored, and others weighed.
  void multiply_keys(std::int64_t tile, const Parked& sums, Beside& beside) const {
    const auto store_scores = [&](auto p) QTALE_INLINE_LAMBDA {
      store_tile_sums<score_tile(p)>(scores(tile) + p * kTileLine, kChunk * std::int64_t{sizeof(float)});
    };
    unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA {
      multiply_page<p>(tile);
      beside.one();
      sums.template store<p>();
      if constexpr (p > 0) store_scores(std::integral_constant<int, p - 1>{});
      beside.one();
    });
    sums.store_totals();
    store_scores(std::integral_constant<int, kVecs - 1>{});
  }
  // Where the scores of a page are summed: in tiles whose sums of values have been stored a page before.
  static constexpr int score_tile(int p) { return p == 1 || p == 2 ? p - 1 : kScoreTile; }

  template <int Page>
  QTALE_INLINE void multiply_page(std::int64_t tile) const {
    constexpr int kScores = score_tile(Page);
    if constexpr (Int8Keys) {
      load_tile<kScores>(w_.starts + tile * kTileRows * kWidth, kTileLine);
    } else {
      zero_tile<kScores>();
    }
    if (Int8Keys && a_.head_dim < kTileLine) {
      multiply_step<Page, kScores, kNarrowLeftTile, kNarrowRightTile>(tile, 0);
      return;
    }
    for (std::int64_t step = 0; step < w_.query_bytes / kTileLine; ++step)
      multiply_step<Page, kScores, kLeftTile, kRightTile>(tile, step);
  }

  template <int Page, int Scores, int Left, int Right>
  QTALE_INLINE void multiply_step(std::int64_t tile, std::int64_t step) const {
    load_tile<Left>(w_.queries + tile * kTileRows * w_.query_bytes + step * kTileLine, w_.query_bytes);
    if constexpr (Int8Keys) {
      load_tile<Right>(bytes_of(pages_[Page]) + step * kTileBytes, kTileLine);
      multiply_tiles<false, Scores, Left, Right>();
    } else {
      load_tile<Right>(w_.keys + Page * kPageTokens * w_.query_bytes / 2 + step * kTileNumbers, kTileLine);
      multiply_bf16_tiles<Scores, Left, Right>();
    }
  }

  std::byte* scores(std::int64_t tile) const {
    return w_.scores + tile % 2 * kTileWeights * std::int64_t{sizeof(float)};
  }
  std::uint16_t* weights(std::int64_t tile) const { return w_.weights + tile % 2 * kTileWeights; }

  Unweighed16 unweighed(std::int64_t tile) const {
    const std::int64_t first = tile * kTileRows;
    return {scores(tile),
            w_.factors + first,
            scales_,
            ranges_ + first,
            state_.tops + first,
            state_.totals + first * kWidth,
            state_.sums + first * state_.stride,
            weights(tile),
            state_.stride,
            min64(kTileRows, count_ - first),
            0};
  }

  // Weights of a tile of queries, and where values times them and their own sums go.
  struct Addends {
    const std::uint16_t *weights, *values;
    float *sums, *totals;
  };
  Addends addends(std::int64_t tile) const {
    const std::int64_t first = tile * kTileRows;
    return {weights(tile), w_.values, state_.sums + first * state_.stride, state_.totals + first * kWidth};
  }

  // What is not finite must not meet a weight of zero, so queries that see different entries take turns.
  void add_apart(std::int64_t tile) const {
    const std::int64_t first = tile * kTileRows, stride = state_.stride;
    const Addends all = addends(tile);
    by_range(first, min64(first + kTileRows, count_), [&](std::int64_t begin, std::int64_t end, const Range& range) {
      Beside nothing;
      Parked sums;
      keep_entries(w_.values, columns(), range, w_.kept);
      copy_floats(all.sums, kTileRows * stride, w_.sums);
      copy_floats(all.totals, kTileRows * kWidth, w_.totals);
      add_values({all.weights, w_.kept, w_.sums, w_.totals}, sums, nothing);
      sums.store_all();
      copy_floats(w_.sums + (begin - first) * stride, (end - begin) * stride, state_.sums + begin * stride);
      copy_floats(w_.totals + (begin - first) * kWidth, (end - begin) * kWidth, state_.totals + begin * kWidth);
    });
  }

  // Leaves the last sums in tiles. Weights are summed as they are rounded, beside the first values, so that rounding
  // shifts no mean of values.
  void add_values(const Addends& all, Parked& sums, Beside& beside) const {
    std::int64_t column = 0;
    const auto add = [&](auto count) {
      const Addends part{all.weights, all.values + column * kColumn, all.sums + column * kWidth, all.totals};
      column == 0 ? add_columns<count, true>(part, sums, beside) : add_columns<count, false>(part, sums, beside);
      column += count;
    };
    while (columns() - column >= kSumTiles) add(std::integral_constant<int, kSumTiles>{});
    if (columns() - column >= 2) add(std::integral_constant<int, 2>{});
    if (column < columns()) add(std::integral_constant<int, 1>{});
  }

  template <int Columns, bool Totals>
  void add_columns(const Addends& part, Parked& sums, Beside& beside) const {
    const std::int64_t stride = state_.stride * std::int64_t{sizeof(float)};
    unroll<kSumTiles - Columns>([&](auto c) QTALE_INLINE_LAMBDA { sums.template store<Columns + c>(); });
    if constexpr (Totals) load_tile<kTotalTile>(part.totals, kTileLine);
    unroll<kValueSteps>([&](auto step) QTALE_INLINE_LAMBDA {
      load_tile<kLeftTile>(part.weights + step * kLineNumbers, 2 * kChunk);
      unroll<Columns>([&](auto c) QTALE_INLINE_LAMBDA {
        if constexpr (step == 0) {
          sums.template store<c>();
          load_tile<c>(part.sums + c * kWidth, stride);
        }
        load_tile<kRightTile>(part.values + c * kColumn + step * kTileNumbers, kTileLine);
        multiply_bf16_tiles<c, kLeftTile, kRightTile>();
        beside.one();
      });
      if constexpr (Totals) {
        load_tile<kRightTile>(kOneColumn.numbers, kTileLine);
        multiply_bf16_tiles<kTotalTile, kLeftTile, kRightTile>();
      }
    });
    sums = {part.sums, part.totals, state_.stride, Columns};
  }

  using Base::a_, Base::b_, Base::begin_, Base::end_, Base::count_, Base::ranges_, Base::state_;
  using Base::by_range, Base::page, Base::pages_ahead, Base::set_ranges, Base::values_at_, Base::whole_;

  TileWorkspace w_;
  PagesAhead<> ahead_;
  const typename E::T* pages_[kPages] = {};
  const float* scales_[kPages] = {};
  std::int64_t at_ = 0;  // entry where the chunk begins
};

inline void run_tiles(const AttentionArgs& a, const AttentionBlock& b, std::int64_t begin, std::int64_t end,
                      std::byte* scratch, std::byte* state) {
  if (a.dtype == DType::s8) return TileSpan<F16, true>(a, b, begin, end, scratch, state).run();
  if (a.dtype == DType::f16) return TileSpan<F16, false>(a, b, begin, end, scratch, state).run();
  TileSpan<F32, false>(a, b, begin, end, scratch, state).run();
}

constexpr AttentionKernel amx_kernel = {
    kTileQueries, state_bytes, amx_scratch_bytes, prepare_tiles, run_tiles, merge, finish,
};

}  // namespace
}  // namespace qtale::cpu::attending

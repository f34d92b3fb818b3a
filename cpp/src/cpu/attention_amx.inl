// Attention of a block of queries over one span of the cache on AMX, for 16 queries at once: scores are products of
// tiles of codes or of bf16 numbers, values those of bf16 numbers, and AVX-512 weighs the scores of one tile while the
// values of the one before are multiplied. Few queries are multiplied in tiles, too: a row has the same sums so.
#pragma once

#include "cpu/attention_amx_softmax.inl"

namespace qtale::cpu::attending {
namespace {

constexpr std::int64_t kTileQueries = 128;  // of a block: more would leave L1 with all that is summed
constexpr int kQueryTile = 4, kKeyTile = 5, kWeightTile = 6, kValueTile = 7;  // those before hold sums

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
    shapes.set(kQueryTile, kTileRows, a.head_dim);
    shapes.set(kKeyTile, a.head_dim / 4, kTileLine);
  }
  return shapes;
}

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
  std::int64_t tiles() const { return ceil_div(count_, kTileRows); }
  std::int64_t columns() const { return state_.stride / kWidth; }

  void run_chunk() {
    ahead_ = pages_ahead(at_ + kChunk);
    convert();
    const bool apart = !whole_ && !all_finite(w_.values, columns());
    Unweighed16 nothing{};
    for (std::int64_t tile = 0; tile < tiles(); ++tile) {
      ahead_.ask(ceil_div(ahead_.lines(), tiles()));
      multiply_keys(tile);
      Unweighed16 fresh = unweighed(tile);
      tile > 0 ? add_tile(tile - 1, apart, fresh) : weigh(fresh, fresh.rows);
    }
    add_tile(tiles() - 1, apart, nothing);
  }

  // Keys and values of the chunk to tiles. Entries that no query sees are zero: they may be any bits.
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

  void multiply_keys(std::int64_t tile) const {
    const std::byte* queries = w_.queries + tile * kTileRows * w_.query_bytes;
    unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA {
      if constexpr (Int8Keys) {
        load_tile<p>(w_.starts + tile * kTileRows * kWidth, kTileLine);
      } else {
        zero_tile<p>();
      }
    });
    for (std::int64_t step = 0; step < w_.query_bytes / kTileLine; ++step) {
      load_tile<kQueryTile>(queries + step * kTileLine, w_.query_bytes);
      unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA {
        if constexpr (Int8Keys) {
          load_tile<kKeyTile>(bytes_of(pages_[p]) + step * kTileBytes, kTileLine);
          multiply_tiles<false, p, kQueryTile, kKeyTile>();
        } else {
          load_tile<kKeyTile>(w_.keys + p * kPageTokens * w_.query_bytes / 2 + step * kTileNumbers, kTileLine);
          multiply_bf16_tiles<p, kQueryTile, kKeyTile>();
        }
      });
    }
    unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA {
      store_tile_sums<p>(w_.scores + p * kTileLine, kChunk * std::int64_t{sizeof(float)});
    });
  }

  std::uint16_t* weights(std::int64_t tile) const { return w_.weights + tile % 2 * kTileWeights; }

  Unweighed16 unweighed(std::int64_t tile) const {
    const std::int64_t first = tile * kTileRows;
    return {w_.scores,
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

  // Weighs so many of those that wait.
  void weigh(Unweighed16& u, std::int64_t rows) const {
    const std::int64_t first = u.weighed, end = min64(u.rows, first + rows);
    if (first == end) return;
    whole_ ? weigh_queries<Int8Keys, true>(u, first, end) : weigh_queries<Int8Keys, false>(u, first, end);
    u.weighed = end;
  }

  // Adds the values of a tile of queries that are weighed, and weighs others. What is not finite must not meet a weight
  // of zero, so then queries that see different entries take turns.
  void add_tile(std::int64_t tile, bool apart, Unweighed16& others) const {
    const std::int64_t first = tile * kTileRows, stride = state_.stride;
    float* const sums = state_.sums + first * stride;
    float* const totals = state_.totals + first * kWidth;
    if (!apart) {
      add_values({weights(tile), w_.values, sums, totals}, others);
    } else {
      by_range(first, min64(first + kTileRows, count_), [&](std::int64_t begin, std::int64_t end, const Range& range) {
        Unweighed16 nothing{};
        keep_entries(w_.values, columns(), range, w_.kept);
        copy_floats(sums, kTileRows * stride, w_.sums);
        copy_floats(totals, kTileRows * kWidth, w_.totals);
        add_values({weights(tile), w_.kept, w_.sums, w_.totals}, nothing);
        copy_floats(w_.sums + (begin - first) * stride, (end - begin) * stride, state_.sums + begin * stride);
        copy_floats(w_.totals + (begin - first) * kWidth, (end - begin) * kWidth, state_.totals + begin * kWidth);
      });
    }
    weigh(others, others.rows);
  }

  // Weights of a tile of queries, and where values times them and their own sums go.
  struct Addends {
    const std::uint16_t *weights, *values;
    float *sums, *totals;
  };

  // Weights are summed as they are rounded, beside the first values, so that rounding shifts no mean of values.
  void add_values(const Addends& all, Unweighed16& others) const {
    const std::int64_t turns = kValueSteps * ceil_div(columns(), 4), pace = ceil_div(kTileRows, turns);
    std::int64_t column = 0;
    const auto add = [&](auto count) {
      const Addends part{all.weights, all.values + column * kColumn, all.sums + column * kWidth, all.totals};
      column == 0 ? add_columns<count, true>(part, pace, others) : add_columns<count, false>(part, pace, others);
      column += count;
    };
    while (columns() - column >= 4) add(std::integral_constant<int, 4>{});
    if (columns() - column >= 2) add(std::integral_constant<int, 2>{});
    if (column < columns()) add(std::integral_constant<int, 1>{});
  }

  template <int Columns, bool Totals>
  void add_columns(const Addends& part, std::int64_t pace, Unweighed16& others) const {
    constexpr int kTotals = Columns < 4 ? 2 : 4, kOnes = kTotals + 1;  // tiles that are whole and have nothing to do
    const std::int64_t stride = state_.stride * std::int64_t{sizeof(float)};
    unroll<Columns>([&](auto c) QTALE_INLINE_LAMBDA { load_tile<c>(part.sums + c * kWidth, stride); });
    if constexpr (Totals) {
      load_tile<kTotals>(part.totals, kTileLine);
      load_tile<kOnes>(kOneColumn.numbers, kTileLine);
    }
    unroll<kValueSteps>([&](auto step) QTALE_INLINE_LAMBDA {
      load_tile<kWeightTile>(part.weights + step * kLineNumbers, 2 * kChunk);
      unroll<Columns>([&](auto c) QTALE_INLINE_LAMBDA {
        load_tile<kValueTile>(part.values + c * kColumn + step * kTileNumbers, kTileLine);
        multiply_bf16_tiles<c, kWeightTile, kValueTile>();
      });
      if constexpr (Totals) multiply_bf16_tiles<kTotals, kWeightTile, kOnes>();
      weigh(others, pace);
    });
    unroll<Columns>([&](auto c) QTALE_INLINE_LAMBDA { store_tile_sums<c>(part.sums + c * kWidth, stride); });
    if constexpr (Totals) store_tile_sums<kTotals>(part.totals, kTileLine);
  }

  using Base::a_, Base::b_, Base::begin_, Base::end_, Base::count_, Base::ranges_, Base::state_;
  using Base::by_range, Base::page, Base::pages_ahead, Base::set_ranges, Base::values_at_, Base::whole_;

  TileWorkspace w_;
  PagesAhead ahead_;
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

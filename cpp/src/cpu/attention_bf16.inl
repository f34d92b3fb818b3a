// Attention of a block of queries over one span of the cache, with queries, keys, weights and values rounded to bf16
// where they are multiplied: twice the products of float32 in an instruction. Keys that the cache has in 8 bits meet
// queries of 8 bits.
#pragma once

#include "cpu/attention_bf16_workspace.inl"

namespace qtale::cpu::attending {
namespace {

template <class E, bool Int8Keys>
class RoundedSpan : BlockSpan<E> {
  using Base = BlockSpan<E>;

 public:
  RoundedSpan(const AttentionArgs& a, const AttentionBlock& b, std::int64_t begin, std::int64_t end, std::byte* scratch,
              std::byte* state)
      : Base(a, b, begin, end, RoundedWorkspace(scratch, b.rows * a.group, a.head_dim).ranges, state),
        w_(scratch, count_, a.head_dim) {}

  void run() {
    state_.clear(count_);
    if (begin_ >= end_) return;
    for (std::int64_t at = begin_ / kChunk * kChunk; at < end_; at += kChunk) {
      set_ranges(at);
      at_ = at;
      if (direct_) {
        run_direct();
      } else {
        convert(at);
        run_chunk();
      }
    }
  }

 private:
  static constexpr int kHalf = kVecs / 2;

  void convert(std::int64_t at) const {
    const std::int64_t depth = a_.head_dim;
    for (int p = 0; p < kPages; ++p) {
      const std::int64_t entry = at + p * kPageTokens;
      if (entry + kPageTokens <= begin_ || entry >= end_) continue;
      const auto* from = page(entry);
      if (!Int8Keys) pair_keys<E>(from, depth, w_.keys + p * kLine, kKeyStep);
      pair_values<E>(from + values_at_, depth, state_.stride, w_.values + p * kPageTokens * state_.stride);
    }
  }

  void run_direct() const {
    const typename E::T *keys[kVecs], *next[kVecs];
    for (int p = 0; p < kVecs; ++p) {
      keys[p] = page(at_ + p * kWidth);
      next[p] = page_ahead(at_ + kChunk + p * kWidth);
    }
    if (vectors_seen(0, count_) == 0) return;
    if constexpr (Int8Keys) {
      kDirectInt8Scores.by_rows[count_ - 1](w_.coded, keys, next, a_.head_dim, state_.tops, w_.scores);
    } else {
      kDirectScores<E>.by_rows[count_ - 1](w_.queries, keys, next, a_.head_dim, w_.scores);
    }
    hide(w_.scores, count_, ranges_);
    raise(0, count_, ~0u, w_.scores);
    Unweighed all = unweighed(0, count_, w_.scores);
    weigh_all(all);
    by_range(0, count_,
             [&](std::int64_t begin, std::int64_t end, const Range& range) { add_values(begin, end, range); });
  }

  // Scores of a tile are weighed while the values of the one before it are multiplied.
  void run_chunk() const {
    const typename E::T* pages[kVecs];
    for (int p = 0; p < kVecs; ++p) pages[p] = page(at_ + p * kWidth);
    const Unweighed nothing = unweighed(0, 0, w_.scores);
    std::int64_t before = 0;
    PagesAhead<> next = pages_ahead(at_ + kChunk);
    const std::int64_t lines = ceil_div(next.lines(), tiles());
    by_tile([&](std::int64_t begin, std::int64_t end) {
      next.ask(lines);
      const Unweighed fresh = vectors_seen(begin, end) > 0 ? score(begin, end, pages) : nothing;
      add_tile(before, begin, fresh);
      before = begin;
    });
    add_tile(before, count_, nothing);
  }

  Unweighed score(std::int64_t begin, std::int64_t end, const typename E::T* const (&pages)[kVecs]) const {
    unsigned raised = vectors_seen(begin, end) > kHalf ? multiply_keys<kVecs>(begin, end, pages)
                                                       : multiply_keys<kHalf>(begin, end, pages);
    if (!whole_) {
      hide(w_.scores, end - begin, ranges_ + begin);
      raised = ~0u;
    }
    raise(begin, end, raised, w_.scores);
    return unweighed(begin, end, w_.scores);
  }

  template <int Vecs>
  unsigned multiply_keys(std::int64_t begin, std::int64_t end, const typename E::T* const (&pages)[kVecs]) const {
    const float* tops = state_.tops + begin;
    const std::int64_t tile = end - begin - 1;
    if constexpr (Int8Keys) {
      return kInt8Scores<Vecs>.by_rows[tile](w_.coded.from(begin), pages, nullptr, a_.head_dim, tops, w_.scores);
    } else {
      return kRoundedScores<Vecs>.by_rows[tile](w_.queries + begin * kRoundedStride, w_.keys, a_.head_dim, tops,
                                                w_.scores);
    }
  }

  // Adds the values of queries that are weighed, and weighs others.
  void add_tile(std::int64_t begin, std::int64_t end, Unweighed others) const {
    if (begin < end) {
      whole_ ? add_pairs(begin, end, 0, w_.values, kChunk / 2, others)
             : by_range(begin, end, [&](std::int64_t first, std::int64_t last, const Range& range) {
                 add_values(first, last, range);
               });
    }
    weigh_all(others);
  }

  std::int64_t tiles() const { return ceil_div(count_, kRoundedRows); }

  template <class Fn>
  void by_tile(Fn fn) const {
    const std::int64_t rows = count_ / tiles(), longer = count_ % tiles();
    for (std::int64_t t = 0, begin = 0; begin < count_; ++t) {
      const std::int64_t end = begin + rows + (t < longer ? 1 : 0);
      fn(begin, end);
      begin = end;
    }
  }

  // Raises the tops of those queries whose bits are set.
  void raise(std::int64_t begin, std::int64_t end, unsigned raised, const float* scores) const {
    for (std::int64_t i = begin; i < end && raised != 0; ++i, raised >>= 1, scores += kChunk)
      if ((raised & 1) != 0)
        raise_top(scores, state_.tops[i], state_.totals + i * kWidth, state_.sums + i * state_.stride, state_.stride);
  }

  Unweighed unweighed(std::int64_t begin, std::int64_t end, const float* scores) const {
    return {scores, state_.tops + begin, state_.totals + begin * kWidth, w_.weights + begin * kChunk, 2 * (end - begin),
            &kExp2};
  }

  // Of a pair that is seen by half, the other half is no factor at all.
  void add_values(std::int64_t begin, std::int64_t end, const Range& range) const {
    const auto add = [&](std::int64_t entry, const std::uint16_t* values, std::int64_t pairs) {
      Unweighed others = unweighed(0, 0, w_.scores);
      add_pairs(begin, end, entry, values, pairs, others);
    };
    std::int64_t entry = range.begin;
    if (entry % 2 != 0) {
      add(entry - 1, seen_half(entry), 1);
      ++entry;
    }
    const std::int64_t pairs = (range.end - entry) / 2;
    if (pairs > 0)
      direct_ ? add_direct(begin, end, entry, pairs) : add(entry, w_.values + entry * state_.stride, pairs);
    entry += 2 * pairs;
    if (entry < range.end) add(entry, seen_half(entry), 1);
  }

  // The pairs of values that an entry is in, with zero in place of its neighbour.
  const std::uint16_t* seen_half(std::int64_t entry) const {
    const __m512i kept = _mm512_set1_epi32(entry % 2 == 0 ? 0xffff : static_cast<int>(0xffff0000));
    const std::uint16_t* from = w_.values + entry / 2 * 2 * state_.stride;
    if (direct_) {
      const auto* low = page(at_ + entry) + values_at_ + entry % kPageTokens / 2 * 2 * a_.head_dim;
      for (std::int64_t i = 0; i < a_.head_dim; i += kWidth)
        store_pairs(w_.half + 2 * i, E::load(low + i), E::load(low + a_.head_dim + i));
      from = w_.half;
    }
    for (std::int64_t i = 0; i < 2 * state_.stride; i += kLine)
      _mm512_storeu_si512(w_.half + i, _mm512_and_si512(_mm512_loadu_si512(from + i), kept));
    return w_.half;
  }

  void add_direct(std::int64_t begin, std::int64_t end, std::int64_t entry, std::int64_t pairs) const {
    Stretch<E> stretches[kPages];
    std::int64_t count = 0;
    for (std::int64_t at = entry; pairs > 0; ++count) {
      const std::int64_t taken = min64(pairs, (kPageTokens - at % kPageTokens) / 2);
      const std::int64_t row = values_at_ + at % kPageTokens * a_.head_dim;
      stretches[count] = {page(at_ + at) + row, page_ahead(at_ + kChunk + at) + row, taken};
      at += 2 * taken;
      pairs -= taken;
    }
    const auto add = [&](const auto& tiles, std::int64_t column) {
      tiles.by_rows[end - begin - 1](w_.weights + begin * kChunk + entry, stretches, count, a_.head_dim, column,
                                     state_.sums + begin * a_.head_dim);
    };
    by_columns([&](std::int64_t column) { add(kDirectValues<E, kVecs>, column); },
               [&](std::int64_t column) { add(kDirectValues<E, kHalf>, column); },
               [&](std::int64_t column) { add(kDirectValues<E, 1>, column); });
  }

  void add_pairs(std::int64_t begin, std::int64_t end, std::int64_t entry, const std::uint16_t* values,
                 std::int64_t pairs, Unweighed& others) const {
    const auto add = [&](const auto& tiles, std::int64_t column) {
      tiles.by_rows[end - begin - 1](w_.weights + begin * kChunk + entry, values + 2 * column, pairs,
                                     state_.sums + begin * state_.stride + column, state_.stride, others);
    };
    by_columns([&](std::int64_t column) { add(kRoundedValues<kVecs>, column); },
               [&](std::int64_t column) { add(kRoundedValues<kHalf>, column); },
               [&](std::int64_t column) { add(kRoundedValues<1>, column); });
  }

  // Calls one of these for vectors of dimensions, as many at once as there are.
  template <class All, class Half, class One>
  void by_columns(All all, Half half, One one) const {
    for (std::int64_t column = 0; column < state_.stride;) {
      const std::int64_t left = (state_.stride - column) / kWidth;
      const std::int64_t taken = left >= kVecs ? kVecs : left >= kHalf ? kHalf : 1;
      taken == kVecs ? all(column) : taken == kHalf ? half(column) : one(column);
      column += taken * kWidth;
    }
  }

  using Base::a_, Base::b_, Base::begin_, Base::end_, Base::count_, Base::ranges_, Base::state_;
  using Base::by_range, Base::page, Base::page_ahead, Base::pages_ahead, Base::set_ranges, Base::values_at_,
      Base::vectors_seen, Base::whole_;

  RoundedWorkspace w_;
  const bool direct_ = count_ <= kDirectRows && a_.head_dim % kWidth == 0;  // whether nothing is converted
  std::int64_t at_ = 0;                                                     // entry where the chunk begins
};

inline void run_rounded(const AttentionArgs& a, const AttentionBlock& b, std::int64_t begin, std::int64_t end,
                        std::byte* scratch, std::byte* state) {
  if (a.dtype == DType::s8) return RoundedSpan<F16, true>(a, b, begin, end, scratch, state).run();
  if (a.dtype == DType::f16) return RoundedSpan<F16, false>(a, b, begin, end, scratch, state).run();
  RoundedSpan<F32, false>(a, b, begin, end, scratch, state).run();
}

constexpr AttentionKernel rounded_kernel = {
    kQueries, state_bytes, rounded_scratch_bytes, prepare_rounded, run_rounded, merge, finish,
};

}  // namespace
}  // namespace qtale::cpu::attending

// Attention of a block of queries over one span of the cache, with queries, keys, weights and values rounded to bf16
// where they are multiplied: twice the products of float32 in an instruction.
#pragma once

#include "cpu/attention_bf16_tile.inl"

namespace qtale::cpu::attending {
namespace {

// Memory of one thread.
struct RoundedWorkspace {
  std::uint16_t* queries;  // [queries, kRoundedStride], scaled to base 2
  std::uint16_t* weights;  // [queries, kChunk]
  std::uint16_t* keys;     // [depth / 2, kChunk] pairs
  std::uint16_t* values;   // [kChunk / 2, stride] pairs
  std::uint16_t* half;     // [stride] pairs
  float* scores;           // [2, kRoundedRows, kChunk]
  Range* ranges;           // [queries]

  RoundedWorkspace(std::byte* memory, std::int64_t count, std::int64_t head_dim)
      : queries(reinterpret_cast<std::uint16_t*>(memory)),
        weights(queries + count * kRoundedStride),
        keys(weights + count * kChunk),
        values(keys + head_dim * kChunk),
        half(values + round_up(head_dim, kWidth) * kChunk),
        scores(reinterpret_cast<float*>(half + 2 * round_up(head_dim, kWidth))),
        ranges(reinterpret_cast<Range*>(scores + 2 * kRoundedRows * kChunk)) {}
  static std::size_t bytes(std::int64_t count, std::int64_t head_dim) {
    const std::int64_t stride = round_up(head_dim, kWidth);
    const std::int64_t halves = count * (kRoundedStride + kChunk) + (head_dim + stride) * kChunk + 2 * stride;
    const std::int64_t floats = 2 * kRoundedRows * kChunk + 2 * round_up(count, 16);
    return static_cast<std::size_t>(halves) * sizeof(std::uint16_t) + static_cast<std::size_t>(floats) * sizeof(float);
  }
};

template <class E>
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
      pair_keys<E>(from, depth, w_.keys + p * kLine);
      pair_values<E>(from + kPageTokens * depth, depth, state_.stride, w_.values + p * kPageTokens * state_.stride);
    }
  }

  void run_direct() const {
    const typename E::T *keys[kVecs], *next[kVecs];
    for (int p = 0; p < kVecs; ++p) {
      keys[p] = page(at_ + p * kWidth);
      next[p] = page_ahead(at_ + kChunk + p * kWidth);
    }
    if (vectors_seen(0, count_) == 0) return;
    kDirectScores<E>.by_rows[count_ - 1](w_.queries, keys, next, a_.head_dim, w_.scores);
    hide(w_.scores, count_, ranges_);
    raise(0, count_, ~0u, w_.scores);
    Unweighed all = unweighed(0, count_, w_.scores);
    weigh_all(all);
    by_range(0, count_,
             [&](std::int64_t begin, std::int64_t end, const Range& range) { add_values(begin, end, range); });
  }

  // Scores of a tile are weighed while those of the next one are multiplied.
  void run_chunk() const {
    Unweighed before = unweighed(0, 0, nullptr);
    float* scores = w_.scores;
    by_tile([&](std::int64_t begin, std::int64_t end) {
      const int vecs = vectors_seen(begin, end);
      if (vecs == 0) return;
      const auto& multiply = vecs > kHalf ? kRoundedScores<kVecs> : kRoundedScores<kHalf>;
      unsigned raised = multiply.by_rows[end - begin - 1](w_.queries + begin * kRoundedStride, w_.keys, a_.head_dim,
                                                          state_.tops + begin, scores, before);
      if (!whole_) {
        hide(scores, end - begin, ranges_ + begin);
        raised = ~0u;
      }
      raise(begin, end, raised, scores);
      before = unweighed(begin, end, scores);
      scores = scores == w_.scores ? w_.scores + kRoundedRows * kChunk : w_.scores;
    });
    weigh_all(before);
    const auto add = [&](std::int64_t begin, std::int64_t end, const Range& range) { add_values(begin, end, range); };
    NextChunk next(*this);
    by_tile([&](std::int64_t begin, std::int64_t end) {
      next.ask();
      whole_ ? add_pairs(begin, end, 0, w_.values, kChunk / 2) : by_range(begin, end, add);
    });
  }

  std::int64_t tiles() const { return (count_ + kRoundedRows - 1) / kRoundedRows; }

  template <class Fn>
  void by_tile(Fn fn) const {
    const std::int64_t rows = count_ / tiles(), longer = count_ % tiles();
    for (std::int64_t t = 0, begin = 0; begin < count_; ++t) {
      const std::int64_t end = begin + rows + (t < longer ? 1 : 0);
      fn(begin, end);
      begin = end;
    }
  }

  // Asks for the pages of the next chunk, for some lines with each tile: all at once would have to wait.
  class NextChunk {
   public:
    explicit NextChunk(const RoundedSpan& s)
        : lines_(s.at_ + kChunk < s.last_ ? kv_head_elements(s.a_.head_dim) * std::int64_t{sizeof(typename E::T)} / 64
                                          : 0),
          step_((lines_ + s.tiles() - 1) / s.tiles()) {
      for (int p = 0; p < kPages; ++p)
        pages_[p] = reinterpret_cast<const char*>(s.page_ahead(s.at_ + kChunk + p * kPageTokens));
    }
    void ask() {
      for (const std::int64_t stop = min64(lines_, line_ + step_); line_ < stop; ++line_)
        for (const char* page : pages_) __builtin_prefetch(page + line_ * 64, 0, 2);
    }

   private:
    const char* pages_[kPages];
    std::int64_t lines_, step_;
    std::int64_t line_ = 0;
  };

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
      add_pairs(begin, end, entry, values, pairs);
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
      const auto* low = page(at_ + entry) + (kPageTokens + entry % kPageTokens / 2 * 2) * a_.head_dim;
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
      const std::int64_t row = (kPageTokens + at % kPageTokens) * a_.head_dim;
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
                 std::int64_t pairs) const {
    const auto add = [&](const auto& tiles, std::int64_t column) {
      tiles.by_rows[end - begin - 1](w_.weights + begin * kChunk + entry, values + 2 * column, pairs,
                                     state_.sums + begin * state_.stride + column, state_.stride);
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
  using Base::by_range, Base::page, Base::page_ahead, Base::set_ranges, Base::vectors_seen, Base::whole_;

  RoundedWorkspace w_;
  const bool direct_ = count_ <= kDirectRows && a_.head_dim % kWidth == 0;  // whether nothing is converted
  std::int64_t at_ = 0;                                                     // entry where the chunk begins
};

inline std::size_t rounded_scratch_bytes(const AttentionArgs& a, std::int64_t queries) {
  return RoundedWorkspace::bytes(queries, a.head_dim);
}

inline void prepare_rounded(const AttentionArgs& a, const AttentionBlock& b, std::byte* scratch) {
  const std::int64_t count = b.rows * a.group;
  const RoundedWorkspace w(scratch, count, a.head_dim);
  const VecF factor = set1(a.scale * 1.44269504f);
  std::uint16_t* to = w.queries;
  for (std::int64_t i = 0; i < count; ++i, to += kRoundedStride) {
    const float* from = heads_at(a.q, a, b, i);
    prefetch_head(heads_at(a.q, a, b, min64(i + kHeadsAhead, count - 1)), a.head_dim);
    for (std::int64_t d = 0; d < a.head_dim; d += kWidth) {
      const VecF x = d + kWidth <= a.head_dim ? load_f32(from + d) : load_part<F32>(from + d, a.head_dim - d);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d),
                          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(mul(x, factor))));
    }
  }
}

inline void run_rounded(const AttentionArgs& a, const AttentionBlock& b, std::int64_t begin, std::int64_t end,
                        std::byte* scratch, std::byte* state) {
  if (a.dtype == DType::f16) return RoundedSpan<F16>(a, b, begin, end, scratch, state).run();
  RoundedSpan<F32>(a, b, begin, end, scratch, state).run();
}

constexpr AttentionKernel rounded_kernel = {
    2 * kQueries, state_bytes, rounded_scratch_bytes, prepare_rounded, run_rounded, merge, finish,
};

}  // namespace
}  // namespace qtale::cpu::attending

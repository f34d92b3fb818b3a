// Attention of a block of queries over one span of the cache, with queries, keys, weights and values rounded to bf16
// where they are multiplied: twice the products of float32 in an instruction.
#pragma once

#include "cpu/attention_bf16_softmax.inl"

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
  float* ones;             // [kRoundedRows]
  float* factors;          // [queries]
  Range* ranges;           // [queries]

  RoundedWorkspace(std::byte* memory, std::int64_t count, std::int64_t head_dim)
      : queries(reinterpret_cast<std::uint16_t*>(memory)),
        weights(queries + count * kRoundedStride),
        keys(weights + count * kChunk),
        values(keys + head_dim * kChunk),
        half(values + round_up(head_dim, kWidth) * kChunk),
        scores(reinterpret_cast<float*>(half + 2 * round_up(head_dim, kWidth))),
        ones(scores + 2 * kRoundedRows * kChunk),
        factors(ones + kWidth),
        ranges(reinterpret_cast<Range*>(factors + round_up(count, 16))) {}
  static std::size_t bytes(std::int64_t count, std::int64_t head_dim) {
    const std::int64_t stride = round_up(head_dim, kWidth);
    const std::int64_t halves = count * (kRoundedStride + kChunk) + (head_dim + stride) * kChunk + 2 * stride;
    const std::int64_t floats = 2 * kRoundedRows * kChunk + kWidth + 3 * round_up(count, 16);
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
      const auto *from = page(entry), *next = page_ahead(entry + kChunk);
      pair_keys<E>(from, next, depth, w_.keys + p * kLine);
      pair_values<E>(from + kPageTokens * depth, next + kPageTokens * depth, depth, state_.stride,
                     w_.values + p * kPageTokens * state_.stride);
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
    weigh_tile(0, count_, w_.scores);
    by_range(0, count_,
             [&](std::int64_t begin, std::int64_t end, const Range& range) { add_values(begin, end, range); });
  }

  // Weights follow one tile behind the scores: what they wait for is there, and the CPU works at both.
  void run_chunk() const {
    const std::int64_t tiles = (count_ + kRoundedRows - 1) / kRoundedRows;
    const auto first = [&](std::int64_t tile) { return count_ * tile / tiles; };
    const auto scores = [&](std::int64_t tile) { return w_.scores + tile % 2 * kRoundedRows * kChunk; };
    for (std::int64_t t = 0; t < tiles; ++t) {
      score(first(t), first(t + 1), scores(t));
      if (t > 0) weigh_tile(first(t - 1), first(t), scores(t - 1));
    }
    weigh_tile(first(tiles - 1), count_, scores(tiles - 1));
    for (std::int64_t t = 0; t < tiles; ++t)
      by_range(first(t), first(t + 1),
               [&](std::int64_t begin, std::int64_t end, const Range& range) { add_values(begin, end, range); });
  }

  void score(std::int64_t begin, std::int64_t end, float* scores) const {
    const std::uint16_t* const queries = w_.queries + begin * kRoundedStride;
    const auto rows = end - begin - 1;
    const int vecs = vectors_seen(begin, end);
    if (vecs > kHalf) return kRoundedScores<kVecs>.by_rows[rows](queries, w_.keys, a_.head_dim, scores);
    if (vecs > 0) kRoundedScores<kHalf>.by_rows[rows](queries, w_.keys, a_.head_dim, scores);
  }

  void weigh_tile(std::int64_t begin, std::int64_t end, const float* scores) const {
    if (vectors_seen(begin, end) > 0)
      weigh_rounded(scores, static_cast<int>(end - begin), ranges_ + begin, state_.tops + begin,
                    state_.totals + begin * kWidth, w_.factors + begin, w_.weights + begin * kChunk);
  }

  // Of a pair that is seen by half, the other half is no factor at all.
  void add_values(std::int64_t begin, std::int64_t end, const Range& range) const {
    const float* factors = w_.factors + begin;
    const auto add = [&](std::int64_t entry, const std::uint16_t* values, std::int64_t pairs) {
      add_pairs(begin, end, entry, values, pairs, factors);
      factors = w_.ones;
    };
    std::int64_t entry = range.begin;
    if (entry % 2 != 0) {
      add(entry - 1, seen_half(entry), 1);
      ++entry;
    }
    const std::int64_t pairs = (range.end - entry) / 2;
    if (direct_) {
      for (const std::int64_t stop = entry + 2 * pairs; entry < stop;) {
        const std::int64_t count = min64(stop, (entry / kPageTokens + 1) * kPageTokens) - entry;
        add_direct(begin, end, entry, count / 2, factors);
        factors = w_.ones;
        entry += count;
      }
    } else if (pairs > 0) {
      add(entry, w_.values + entry * state_.stride, pairs);
      entry += 2 * pairs;
    }
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

  void add_direct(std::int64_t begin, std::int64_t end, std::int64_t entry, std::int64_t pairs,
                  const float* factors) const {
    const std::int64_t depth = a_.head_dim, row = (kPageTokens + entry % kPageTokens) * depth;
    const auto *values = page(at_ + entry) + row, *next = page_ahead(at_ + kChunk + entry) + row;
    const auto add = [&](const auto& tiles, std::int64_t column) {
      tiles.by_rows[end - begin - 1](w_.weights + begin * kChunk + entry, values + column, next + column, pairs, depth,
                                     factors, state_.sums + begin * depth + column);
    };
    by_columns([&](std::int64_t column) { add(kDirectValues<E, kVecs>, column); },
               [&](std::int64_t column) { add(kDirectValues<E, kHalf>, column); },
               [&](std::int64_t column) { add(kDirectValues<E, 1>, column); });
  }

  void add_pairs(std::int64_t begin, std::int64_t end, std::int64_t entry, const std::uint16_t* values,
                 std::int64_t pairs, const float* factors) const {
    const auto add = [&](const auto& tiles, std::int64_t column) {
      tiles.by_rows[end - begin - 1](w_.weights + begin * kChunk + entry, values + 2 * column, pairs, factors,
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
  using Base::by_range, Base::page, Base::page_ahead, Base::set_ranges, Base::vectors_seen;

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
  store_f32(w.ones, set1(1.0f));
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

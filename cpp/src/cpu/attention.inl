// Attention of a block of queries over one span of the cache, in float32.
#pragma once

#include "cpu/attention_block.inl"

namespace qtale::cpu::attending {
namespace {

constexpr std::int64_t kFewQueries = 12;  // read the pages as they are

template <class E, int TileRows, int TileVecs>
class Span : BlockSpan<E> {
  using Base = BlockSpan<E>;

 public:
  Span(const AttentionArgs& a, const AttentionBlock& b, std::int64_t begin, std::int64_t end, std::byte* scratch,
       std::byte* state)
      : Base(a, b, begin, end, Workspace(scratch, b.rows * a.group, a.head_dim).ranges, state),
        w_(scratch, count_, a.head_dim) {}

  void run() {
    state_.clear(count_);
    if (begin_ >= end_) return;
    const bool whole = a_.head_dim % kWidth == 0;
    for (std::int64_t at = begin_ / kChunk * kChunk; at < end_; at += kChunk) {
      set_ranges(at);
      next_ = at + kChunk;
      ahead_ = next_ < last_ ? 0 : INT64_MAX;
      if (whole && (sizeof(typename E::T) == 4 || count_ <= kFewQueries)) {
        run_chunk(in_place(at));
      } else {
        run_chunk(converted(at));
      }
    }
  }

 private:
  // Few rows leave registers for more vectors, up to those of a chunk.
  static constexpr int kHalf = TileVecs > 1 ? TileVecs / 2 : 1;
  static constexpr int kWide = 2 * TileVecs < kVecs ? 2 * TileVecs : kVecs;
  static constexpr int kFewRows = TileRows / 2;

  Chunk<E> in_place(std::int64_t at) const {
    Chunk<E> chunk;
    for (int p = 0; p < kVecs; ++p) chunk.keys[p] = page(at + p * kWidth) + p * kWidth % kPageTokens;
    for (int p = 0; p < kPages; ++p) chunk.values[p] = page(at + p * kPageTokens) + values_at_;
    chunk.value_stride = a_.head_dim;
    return chunk;
  }

  Chunk<F32> converted(std::int64_t at) const {
    Chunk<F32> chunk;
    const std::int64_t depth = a_.head_dim, stride = state_.stride;
    for (int p = 0; p < kPages; ++p) {
      float* const values = w_.values + p * kPageTokens * stride;
      chunk.values[p] = values;
      const std::int64_t entry = at + p * kPageTokens;
      if (entry + kPageTokens <= begin_ || entry >= end_) continue;
      const typename E::T* from = page(entry);
      float* const keys = w_.keys + p * kPageTokens * depth;
      for (std::int64_t i = 0; i < kPageTokens * depth; i += kWidth) store_f32(keys + i, E::load(from + i));
      from += kPageTokens * depth;
      for (std::int64_t j = 0; j < kPageTokens; ++j, from += depth)
        for (std::int64_t i = 0; i < depth; i += kWidth)
          store_f32(values + j * stride + i,
                    i + kWidth <= depth ? E::load(from + i) : load_part<E>(from + i, depth - i));
    }
    for (int p = 0; p < kVecs; ++p)
      chunk.keys[p] = w_.keys + p * kWidth / kPageTokens * kPageTokens * depth + p * kWidth % kPageTokens;
    chunk.value_stride = stride;
    return chunk;
  }

  // What a product of some steps shall ask for: the next part of the next chunk, as long as one of the first tiles
  // asks.
  Ahead ahead(bool asks, std::int64_t steps) {
    const auto* idle = reinterpret_cast<const char*>(w_.factors);
    const std::int64_t page = kv_head_bytes(a_.head_dim, a_.dtype);
    const std::int64_t step = 32 * static_cast<std::int64_t>(sizeof(typename E::T)) / (count_ > TileRows ? 2 : 1);
    if (!asks || ahead_ >= kPages * page) return {idle, idle, 0};
    const auto at = [&](std::int64_t offset) {
      const std::int64_t wanted = next_ / kPageTokens + offset / page, last = (last_ - 1) / kPageTokens;
      return static_cast<const char*>(b_.pages[min64(wanted, last)]) + b_.kv_head * page + offset % page;
    };
    const std::int64_t first = ahead_, second = ahead_ + steps * step;
    ahead_ = second + steps * step;
    return {at(first), second < kPages * page ? at(second) : idle, step};
  }

  // Weights follow one tile behind the scores: what they wait for is there, and the CPU works at both.
  template <class C>
  void run_chunk(const Chunk<C>& chunk) {
    const std::int64_t tiles = (count_ + TileRows - 1) / TileRows;
    const auto first = [&](std::int64_t tile) { return count_ * tile / tiles; };
    for (std::int64_t t = 0; t < tiles; ++t) {
      score(chunk, first(t), first(t + 1), t < 2);
      if (t > 0) weigh_tile(first(t - 1), first(t));
    }
    weigh_tile(first(tiles - 1), count_);
    for (std::int64_t t = 0; t < tiles; ++t)
      by_range(first(t), first(t + 1), [&](std::int64_t begin, std::int64_t end, const Range& range) {
        add_values(chunk, begin, end, range, t < 2);
      });
  }

  template <class C>
  void score(const Chunk<C>& chunk, std::int64_t begin, std::int64_t end, bool asks) {
    const int vecs = vectors_seen(begin, end);
    const std::int64_t depth = a_.head_dim;
    const float* const queries = w_.queries + begin * kQueryStride;
    float* const weights = w_.weights + begin * kChunk;
    const auto multiply = [&](const auto& tiles, int p) {
      tiles.by_rows[end - begin - 1](queries, chunk.keys + p, depth, ahead(asks, depth), weights + p * kWidth);
    };
    for (int p = 0; p < vecs;) {
      if (kWide > TileVecs && end - begin <= kFewRows && vecs - p > TileVecs) {
        multiply(kScores<C, kWide, kFewRows>, p);
        p += kWide;
      } else if (vecs - p > kHalf) {
        multiply(kScores<C, TileVecs, TileRows>, p);
        p += TileVecs;
      } else {
        multiply(kScores<C, kHalf, TileRows>, p);
        p += kHalf;
      }
    }
  }

  void weigh_tile(std::int64_t begin, std::int64_t end) const {
    if (vectors_seen(begin, end) > 0)
      weigh(w_.weights + begin * kChunk, static_cast<int>(end - begin), ranges_ + begin, state_.tops + begin,
            state_.totals + begin * kWidth, w_.factors + begin);
  }

  template <class C>
  void add_values(const Chunk<C>& chunk, std::int64_t begin, std::int64_t end, const Range& range, bool asks) {
    const auto add = [&](const auto& tiles, std::int64_t column) {
      tiles.by_rows[end - begin - 1](w_.weights + begin * kChunk, chunk, range.begin, range.end, column,
                                     w_.factors + begin, ahead(asks, range.end - range.begin),
                                     state_.sums + begin * state_.stride + column, state_.stride);
    };
    for (std::int64_t column = 0; column < state_.stride;) {
      const std::int64_t left = (state_.stride - column) / kWidth;
      if (kWide > TileVecs && end - begin <= kFewRows && left >= kWide) {
        add(kValues<C, kWide, kFewRows>, column);
        column += kWide * kWidth;
      } else if (left >= TileVecs) {
        add(kValues<C, TileVecs, TileRows>, column);
        column += TileVecs * kWidth;
      } else if (left >= kHalf) {
        add(kValues<C, kHalf, TileRows>, column);
        column += kHalf * kWidth;
      } else {
        add(kValues<C, 1, TileRows>, column);
        column += kWidth;
      }
    }
  }

  using Base::a_, Base::b_, Base::begin_, Base::end_, Base::count_, Base::ranges_, Base::state_, Base::whole_,
      Base::last_;
  using Base::by_range, Base::page, Base::set_ranges, Base::values_at_, Base::vectors_seen;

  Workspace w_;
  std::int64_t next_ = 0;   // entry where the next chunk begins
  std::int64_t ahead_ = 0;  // bytes of it that were asked for
};

inline std::size_t scratch_bytes(const AttentionArgs& a, std::int64_t queries) {
  return Workspace::bytes(queries, a.head_dim);
}

inline void prepare(const AttentionArgs& a, const AttentionBlock& b, std::byte* scratch) {
  const std::int64_t count = b.rows * a.group;
  float* to = Workspace(scratch, count, a.head_dim).queries;
  const float factor = a.scale * 1.44269504f;
  for (std::int64_t i = 0; i < count; ++i, to += kQueryStride) {
    const float* from = heads_at(a.q, a, b, i);
    prefetch_head(heads_at(a.q, a, b, min64(i + kHeadsAhead, count - 1)), a.head_dim);
    for (std::int64_t d = 0; d < a.head_dim; ++d) to[d] = from[d] * factor;
  }
}

template <int TileRows, int TileVecs>
void run(const AttentionArgs& a, const AttentionBlock& b, std::int64_t begin, std::int64_t end, std::byte* scratch,
         std::byte* state) {
  if (a.dtype == DType::f16) return Span<F16, TileRows, TileVecs>(a, b, begin, end, scratch, state).run();
  Span<F32, TileRows, TileVecs>(a, b, begin, end, scratch, state).run();
}

template <int TileRows, int TileVecs>
constexpr AttentionKernel kernel = {
    kQueries, state_bytes, scratch_bytes, prepare, run<TileRows, TileVecs>, merge, finish,
};

}  // namespace
}  // namespace qtale::cpu::attending

// Attention of a block of queries over one span of the cache. Chunks of entries begin at multiples of kChunk, whoever
// asks, so a query meets the same sums in the same order alone, in a tile and in a batch.
#pragma once

#include "cpu/attention_workspace.inl"

namespace qtale::cpu::attending {
namespace {

constexpr std::int64_t kQueries = 192;    // of a block: so many share the conversion of a chunk
constexpr std::int64_t kFewQueries = 12;  // read the pages as they are

// E is the type of the cache.
template <class E, int TileRows, int TileVecs>
class Span {
 public:
  Span(const AttentionArgs& a, const AttentionBlock& b, std::int64_t begin, std::int64_t end, std::byte* scratch,
       std::byte* state)
      : a_(a),
        b_(b),
        begin_(begin),
        end_(end),
        count_(b.rows * a.group),
        w_(scratch, count_, a.head_dim),
        state_(state, count_, a.head_dim) {}

  void run() {
    state_.clear(count_);
    if (begin_ >= end_) return;
    pack_queries();
    for (std::int64_t r = b_.row; r < b_.row + b_.rows; ++r) {
      shared_begin_ = a_.begin[r] > shared_begin_ ? a_.begin[r] : shared_begin_;
      shared_end_ = min64(shared_end_, a_.end[r]);
      if (a_.begin[r] < a_.end[r] && a_.end[r] > last_) last_ = a_.end[r];
    }
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

  // Keys of a page; pages without entries of the span are replaced by one that has some.
  const typename E::T* page(std::int64_t entry) const {
    const std::int64_t wanted = entry / kPageTokens, first = begin_ / kPageTokens, last = (end_ - 1) / kPageTokens;
    const std::int64_t kept = wanted < first ? first : wanted > last ? last : wanted;
    return static_cast<const typename E::T*>(b_.pages[kept]) + b_.kv_head * kv_head_elements(a_.head_dim);
  }

  void pack_queries() const {
    const float factor = a_.scale * 1.44269504f;
    for (std::int64_t i = 0; i < count_; ++i) {
      const float* from = heads_at(a_.q, a_, b_, i);
      float* to = w_.queries + i * kQueryStride;
      prefetch_head(heads_at(a_.q, a_, b_, min64(i + kHeadsAhead, count_ - 1)), a_.head_dim);
      for (std::int64_t d = 0; d < a_.head_dim; ++d) to[d] = from[d] * factor;
    }
  }

  // What each query sees of the chunk at an entry; most chunks are seen by all queries whole.
  void set_ranges(std::int64_t at) {
    const bool whole = shared_begin_ <= at && at + kChunk <= shared_end_;
    if (whole && whole_) return;
    whole_ = whole;
    const auto within = [&](std::int64_t entry) {
      return static_cast<std::int32_t>(entry < at ? 0 : entry > at + kChunk ? kChunk : entry - at);
    };
    for (std::int64_t r = 0; r < b_.rows; ++r) {
      const std::int64_t begin = a_.begin[b_.row + r], end = a_.end[b_.row + r];
      const Range range = begin < end ? Range{within(begin), within(end)} : Range{0, 0};
      for (std::int64_t g = 0; g < a_.group; ++g) w_.ranges[r * a_.group + g] = range;
    }
  }

  Chunk<E> in_place(std::int64_t at) const {
    Chunk<E> chunk;
    for (int p = 0; p < kVecs; ++p) chunk.keys[p] = page(at + p * kWidth) + p * kWidth % kPageTokens;
    for (int p = 0; p < kPages; ++p) chunk.values[p] = page(at + p * kPageTokens) + kPageTokens * a_.head_dim;
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
    const std::int64_t page = kv_head_elements(a_.head_dim) * static_cast<std::int64_t>(sizeof(typename E::T));
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
    for (std::int64_t t = 0; t < tiles; ++t) add_values(chunk, first(t), first(t + 1), t < 2);
  }

  std::int32_t most_seen(std::int64_t begin, std::int64_t end) const {
    if (whole_) return kChunk;
    std::int32_t seen = 0;
    for (std::int64_t i = begin; i < end; ++i) seen = w_.ranges[i].end > seen ? w_.ranges[i].end : seen;
    return seen;
  }

  template <class C>
  void score(const Chunk<C>& chunk, std::int64_t begin, std::int64_t end, bool asks) {
    const std::int32_t seen = most_seen(begin, end);
    const int vecs = static_cast<int>((seen + kWidth - 1) / kWidth);
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
    if (most_seen(begin, end) > 0)
      weigh(w_.weights + begin * kChunk, static_cast<int>(end - begin), w_.ranges + begin, state_.tops + begin,
            state_.totals + begin * kWidth, w_.factors + begin);
  }

  // Queries that see different entries of a chunk take turns: what one does not see must not meet it, even with weight
  // zero, because it could be infinite.
  template <class C>
  void add_values(const Chunk<C>& chunk, std::int64_t begin, std::int64_t end, bool asks) {
    if (whole_) return add_values(chunk, begin, end, {0, kChunk}, asks);
    while (begin < end) {
      const Range range = w_.ranges[begin];
      std::int64_t stop = begin + 1;
      while (stop < end && w_.ranges[stop] == range) ++stop;
      if (range.begin < range.end) add_values(chunk, begin, stop, range, asks);
      begin = stop;
    }
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

  const AttentionArgs& a_;
  const AttentionBlock& b_;
  std::int64_t begin_, end_;  // entries
  std::int64_t count_;        // queries
  Workspace w_;
  State state_;
  std::int64_t shared_begin_ = 0;  // entries that all queries see
  std::int64_t shared_end_ = INT64_MAX;
  bool whole_ = false;      // whether all queries see all of the chunk
  std::int64_t last_ = 0;   // entry after all that are seen, be it in later spans
  std::int64_t next_ = 0;   // entry where the next chunk begins
  std::int64_t ahead_ = 0;  // bytes of it that were asked for
};

inline std::size_t state_bytes(const AttentionArgs& a, std::int64_t queries) {
  return State::bytes(queries, a.head_dim);
}
inline std::size_t scratch_bytes(const AttentionArgs& a, std::int64_t queries) {
  return Workspace::bytes(queries, a.head_dim);
}

template <int TileRows, int TileVecs>
void run(const AttentionArgs& a, const AttentionBlock& b, std::int64_t begin, std::int64_t end, std::byte* scratch,
         std::byte* state) {
  if (a.dtype == DType::f16) return Span<F16, TileRows, TileVecs>(a, b, begin, end, scratch, state).run();
  Span<F32, TileRows, TileVecs>(a, b, begin, end, scratch, state).run();
}

inline void merge(const AttentionArgs& a, const AttentionBlock& b, std::byte* state, const std::byte* later) {
  const std::int64_t queries = b.rows * a.group;
  merge_states({state, queries, a.head_dim}, {const_cast<std::byte*>(later), queries, a.head_dim}, queries);
}

// Adding 0 turns -0 into 0: whether a tile met entries of weight zero must not show.
inline void finish(const AttentionArgs& a, const AttentionBlock& b, const std::byte* state) {
  const State s(const_cast<std::byte*>(state), b.rows * a.group, a.head_dim);
  for (std::int64_t i = 0; i < b.rows * a.group; ++i) {
    const float total = reduce_add(load_f32(s.totals + i * kWidth));
    const VecF factor = set1(total == 0.0f ? 0.0f : 1.0f / total);
    float* out = heads_at(a.out, a, b, i);
    prefetch_head(heads_at(a.out, a, b, min64(i + kHeadsAhead, b.rows * a.group - 1)), a.head_dim);
    for (std::int64_t d = 0; d < a.head_dim; d += kWidth) {
      const VecF value = add(mul(load_f32(s.sums + i * s.stride + d), factor), set1(0.0f));
      if (d + kWidth <= a.head_dim) {
        store_f32(out + d, value);
      } else {
        store_part<F32>(out + d, value, a.head_dim - d);
      }
    }
  }
}

template <int TileRows, int TileVecs>
constexpr AttentionKernel kernel = {
    kQueries, state_bytes, scratch_bytes, run<TileRows, TileVecs>, merge, finish,
};

}  // namespace
}  // namespace qtale::cpu::attending

// What every way to attend shares: a block of queries meets one span of the cache in chunks of entries. Chunks begin at
// multiples of their length, whoever asks, so a query meets the same sums in the same order alone, in a tile and in a
// batch.
#pragma once

#include "cpu/attention_workspace.inl"

namespace qtale::cpu::attending {
namespace {

constexpr std::int64_t kQueries = 192;  // of a block: so many share the conversion of a chunk

// Asks for pages, for some lines of each at a time: all at once would have to wait.
template <int Pages = kPages>
class PagesAhead {
 public:
  PagesAhead() = default;
  explicit PagesAhead(std::int64_t lines) : lines_(lines) {}
  void set(int page, const void* at) { pages_[page] = static_cast<const char*>(at); }
  std::int64_t lines() const { return lines_; }
  void ask(std::int64_t lines) {
    for (const std::int64_t stop = min64(lines_, line_ + lines); line_ < stop; ++line_)
      for (const char* page : pages_) __builtin_prefetch(page + line_ * 64, 0, 2);
  }

 private:
  const char* pages_[Pages] = {};
  std::int64_t lines_ = 0, line_ = 0;
};

// E is the type of the cache, or of its values where keys have 8 bits; Chunk counts entries.
template <class E, int Chunk = kChunk>
class BlockSpan {
 protected:
  using T = typename E::T;
  using Ahead = PagesAhead<Chunk / kPageTokens>;

  BlockSpan(const AttentionArgs& a, const AttentionBlock& b, std::int64_t begin, std::int64_t end, Range* ranges,
            std::byte* state)
      : a_(a),
        b_(b),
        begin_(begin),
        end_(end),
        count_(b.rows * a.group),
        ranges_(ranges),
        state_(state, count_, a.head_dim) {
    for (std::int64_t r = b.row; r < b.row + b.rows; ++r) {
      shared_begin_ = a.begin[r] > shared_begin_ ? a.begin[r] : shared_begin_;
      shared_end_ = min64(shared_end_, a.end[r]);
      if (a.begin[r] < a.end[r] && a.end[r] > last_) last_ = a.end[r];
    }
  }

  // Keys of a page; pages without entries of the span are replaced by one that has some.
  const T* page(std::int64_t entry) const {
    const std::int64_t wanted = entry / kPageTokens, first = begin_ / kPageTokens, last = (end_ - 1) / kPageTokens;
    const std::int64_t kept = wanted < first ? first : wanted > last ? last : wanted;
    return static_cast<const T*>(b_.pages[kept]) + b_.kv_head * head_elements_;
  }

  // The same for an entry that may be beyond the span and is only asked for.
  const T* page_ahead(std::int64_t entry) const {
    return static_cast<const T*>(b_.pages[min64(entry, last_ - 1) / kPageTokens]) + b_.kv_head * head_elements_;
  }

  // The pages of the chunk at an entry, which has no lines where nothing of it is seen.
  Ahead pages_ahead(std::int64_t at) const {
    Ahead ahead(at < last_ ? kv_head_bytes(a_.head_dim, a_.dtype) / 64 : 0);
    for (int p = 0; p < Chunk / kPageTokens; ++p) ahead.set(p, page_ahead(at + p * kPageTokens));
    return ahead;
  }

  // What each query sees of the chunk at an entry; most chunks are seen by all queries whole.
  void set_ranges(std::int64_t at) {
    const bool whole = shared_begin_ <= at && at + Chunk <= shared_end_;
    if (whole && whole_) return;
    whole_ = whole;
    const auto within = [&](std::int64_t entry) {
      return static_cast<std::int32_t>(entry < at ? 0 : entry > at + Chunk ? Chunk : entry - at);
    };
    for (std::int64_t r = 0; r < b_.rows; ++r) {
      const std::int64_t begin = a_.begin[b_.row + r], end = a_.end[b_.row + r];
      const Range range = begin < end ? Range{within(begin), within(end)} : Range{0, 0};
      for (std::int64_t g = 0; g < a_.group; ++g) ranges_[r * a_.group + g] = range;
    }
  }

  // Vectors of a chunk's entries that any of these queries sees, or comes before one that it sees.
  int vectors_seen(std::int64_t begin, std::int64_t end) const {
    if (whole_) return Chunk / kWidth;
    std::int32_t seen = 0;
    for (std::int64_t i = begin; i < end; ++i) seen = ranges_[i].end > seen ? ranges_[i].end : seen;
    return static_cast<int>((seen + kWidth - 1) / kWidth);
  }

  // Queries that see different entries of a chunk take turns at its values: what one does not see must not meet it,
  // even with weight zero, because it could be infinite.
  template <class Add>
  void by_range(std::int64_t begin, std::int64_t end, Add add) const {
    if (whole_) return add(begin, end, Range{0, Chunk});
    while (begin < end) {
      const Range range = ranges_[begin];
      std::int64_t stop = begin + 1;
      while (stop < end && ranges_[stop] == range) ++stop;
      if (range.begin < range.end) add(begin, stop, range);
      begin = stop;
    }
  }

  const AttentionArgs& a_;
  const AttentionBlock& b_;
  std::int64_t begin_, end_;  // entries
  std::int64_t count_;        // queries
  // Elements of a KV head's part of a page, and of that before its values.
  std::int64_t head_elements_ = kv_head_bytes(a_.head_dim, a_.dtype) / std::int64_t{sizeof(T)};
  std::int64_t values_at_ = kv_values_at(a_.head_dim, a_.dtype) / std::int64_t{sizeof(T)};
  Range* ranges_;
  State state_;
  bool whole_ = false;     // whether all queries see all of the chunk
  std::int64_t last_ = 0;  // entry after all that are seen, be it in later spans

 private:
  std::int64_t shared_begin_ = 0;  // entries that all queries see
  std::int64_t shared_end_ = INT64_MAX;
};

inline std::size_t state_bytes(const AttentionArgs& a, std::int64_t queries) {
  return State::bytes(queries, a.head_dim);
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

}  // namespace
}  // namespace qtale::cpu::attending

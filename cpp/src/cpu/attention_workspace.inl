// Memory that one thread needs for a block of queries, and where the heads of a block lie.
#pragma once

#include "cpu/attention_softmax.inl"

namespace qtale::cpu::attending {
namespace {

// Memory of one thread. Pages of a converted chunk have the layout of the cache, with values in whole vectors.
struct Workspace {
  float* queries;  // [queries, kQueryStride], scaled to base 2
  float* weights;  // [queries, kChunk]
  float* factors;  // [queries]
  Range* ranges;   // [queries]
  float* keys;     // [kPages, head_dim, kPageTokens]
  float* values;   // [kChunk, stride]

  Workspace(std::byte* memory, std::int64_t count, std::int64_t head_dim)
      : queries(reinterpret_cast<float*>(memory)),
        weights(queries + count * kQueryStride),
        factors(weights + count * kChunk),
        ranges(reinterpret_cast<Range*>(factors + round_up(count, 16))),
        keys(factors + 3 * round_up(count, 16)),
        values(keys + kChunk * head_dim) {}
  static std::size_t bytes(std::int64_t count, std::int64_t head_dim) {
    const std::int64_t floats =
        count * (kQueryStride + kChunk) + 3 * round_up(count, 16) + kChunk * (head_dim + round_up(head_dim, kWidth));
    return static_cast<std::size_t>(floats) * sizeof(float);
  }
};

// The heads of a group lie together, rows far apart: a head is asked for some heads before it is needed.
constexpr std::int64_t kHeadsAhead = 12;

template <class Heads>
inline auto heads_at(const Heads& heads, const AttentionArgs& a, const AttentionBlock& b, std::int64_t query) {
  return heads.at(b.row + query / a.group, b.kv_head * a.group + query % a.group);
}
inline void prefetch_head(const float* head, std::int64_t head_dim) {
  for (std::int64_t i = 0; i < head_dim; i += 16) __builtin_prefetch(head + i);
}
inline void prefetch_head(float* head, std::int64_t head_dim) {
  for (std::int64_t i = 0; i < head_dim; i += 16) __builtin_prefetch(head + i, 1);
}

}  // namespace
}  // namespace qtale::cpu::attending

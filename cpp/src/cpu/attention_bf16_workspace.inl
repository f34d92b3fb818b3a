// Memory that one thread needs for queries that are rounded, and how it is filled with those of a block.
#pragma once

#include "cpu/attention_int8_keys.inl"

namespace qtale::cpu::attending {
namespace {

// Memory of one thread.
struct RoundedWorkspace {
  std::uint16_t* queries;  // [queries, kRoundedStride], scaled to base 2
  CodedQueries coded;      // in place of those
  std::uint16_t* weights;  // [queries, kChunk]
  std::uint16_t* keys;     // [depth / 2, kChunk] pairs
  std::uint16_t* values;   // [kChunk / 2, stride] pairs
  std::uint16_t* half;     // [stride] pairs
  float* scores;           // [kRoundedRows, kChunk]
  Range* ranges;           // [queries]

  RoundedWorkspace(std::byte* memory, std::int64_t count, std::int64_t head_dim)
      : queries(reinterpret_cast<std::uint16_t*>(memory)),
        coded{reinterpret_cast<std::int8_t*>(memory), reinterpret_cast<float*>(memory + count * kCodeStride),
              reinterpret_cast<std::int32_t*>(memory + count * (kCodeStride + std::int64_t{sizeof(float)}))},
        weights(queries + count * kRoundedStride),
        keys(weights + count * kChunk),
        values(keys + head_dim * kChunk),
        half(values + round_up(head_dim, kWidth) * kChunk),
        scores(reinterpret_cast<float*>(half + 2 * round_up(head_dim, kWidth))),
        ranges(reinterpret_cast<Range*>(scores + kRoundedRows * kChunk)) {}
  static std::size_t bytes(std::int64_t count, std::int64_t head_dim) {
    const std::int64_t stride = round_up(head_dim, kWidth);
    const std::int64_t halves = count * (kRoundedStride + kChunk) + (head_dim + stride) * kChunk + 2 * stride;
    const std::int64_t floats = kRoundedRows * kChunk + 2 * round_up(count, 16);
    return static_cast<std::size_t>(halves) * sizeof(std::uint16_t) + static_cast<std::size_t>(floats) * sizeof(float);
  }
};

static_assert(kCodeStride + sizeof(float) + sizeof(std::int32_t) <= kRoundedStride * sizeof(std::uint16_t));

inline std::size_t rounded_scratch_bytes(const AttentionArgs& a, std::int64_t queries) {
  return RoundedWorkspace::bytes(queries, a.head_dim);
}

// Keys and queries are rotated by a matrix whose rows have the length sqrt(head_dim).
inline void code_query(const AttentionArgs& a, const float* from, const CodedQueries& to) {
  std::int32_t sum;
  const float scale = round_rotated(from, a.head_dim, to.codes, sum);
  *to.factors = scale * (a.scale * 1.44269504f / static_cast<float>(a.head_dim));
  *to.starts = -kKeyOffset * sum;
}

// A query as bf16 numbers, with zeros from the head's end up to `padded`.
inline void round_query(const AttentionArgs& a, const float* from, std::int64_t padded, std::uint16_t* to) {
  const VecF factor = set1(a.scale * 1.44269504f);
  for (std::int64_t d = 0; d < padded; d += kWidth) {
    const std::int64_t rest = a.head_dim - d;
    const VecF x = rest >= kWidth ? load_f32(from + d) : rest > 0 ? load_part<F32>(from + d, rest) : set1(0.0f);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(mul(x, factor))));
  }
}

inline void prepare_rounded(const AttentionArgs& a, const AttentionBlock& b, std::byte* scratch) {
  const std::int64_t count = b.rows * a.group;
  const RoundedWorkspace w(scratch, count, a.head_dim);
  for (std::int64_t i = 0; i < count; ++i) {
    const float* from = heads_at(a.q, a, b, i);
    prefetch_head(heads_at(a.q, a, b, min64(i + kHeadsAhead, count - 1)), a.head_dim);
    if (a.dtype == DType::s8) {
      code_query(a, from, w.coded.from(i));
    } else {
      round_query(a, from, round_up(a.head_dim, kWidth), w.queries + i * kRoundedStride);
    }
  }
}

}  // namespace
}  // namespace qtale::cpu::attending

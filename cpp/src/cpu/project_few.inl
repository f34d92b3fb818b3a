// Few rows of x times a matrix: the lanes run along the depth, and the matrix is read where it lies, once.
#pragma once

#include "cpu/project_sink.inl"

namespace qtale::cpu::projection {
namespace {

constexpr std::int64_t kAhead = 2560;  // bytes of each stream that are asked for in advance

// Adds one block of Rows rows of x times Entries rows of the matrix where they lie to sums, or begins them.
template <class Lane, class E, int Rows, int Entries>
__attribute__((noipa)) void tile_few(const float* x, const typename E::T* matrix, std::int64_t stride,
                                     std::int64_t depth, bool begins, float* sums) {
  VecF acc[Rows][Entries];
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    unroll<Entries>([&](auto e) QTALE_INLINE_LAMBDA { acc[r][e] = set1(0.0f); });
  });
  const auto step = [&](auto&& load) QTALE_INLINE_LAMBDA {
    VecF entry[Entries];
    unroll<Entries>([&](auto e) QTALE_INLINE_LAMBDA { entry[e] = load(e); });
    unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
      const VecF row = load_f32(x + r * kWidth);
      unroll<Entries>([&](auto e) QTALE_INLINE_LAMBDA { Lane::accumulate(acc[r][e], row, entry[e]); });
    });
  };
  const typename E::T* const end = matrix + depth / kWidth * kWidth * Lane::kNumbers;
#pragma GCC unroll 1
  for (; matrix != end; matrix += kWidth * Lane::kNumbers, x += Rows * kWidth) {
    unroll<Entries>([&](auto e) QTALE_INLINE_LAMBDA {
      __builtin_prefetch(reinterpret_cast<const char*>(matrix + e * stride) + kAhead);
    });
    step([&](auto e) QTALE_INLINE_LAMBDA { return Lane::template load<E>(matrix + e * stride); });
  }
  if (depth % kWidth != 0)
    step([&](auto e) QTALE_INLINE_LAMBDA { return load_lanes<Lane, E>(matrix + e * stride, depth % kWidth); });
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    if constexpr (Entries == 4) {
      const Quad sum = reduce_add4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
      store_quad(sums + r * 4, begins ? sum : load_quad(sums + r * 4) + sum);
    } else {
      unroll<Entries>([&](auto e) QTALE_INLINE_LAMBDA {
        float& sum = sums[r * Entries + e];
        sum = begins ? reduce_add(acc[r][e]) : sum + reduce_add(acc[r][e]);
      });
    }
  });
}

// Entries entry, entry + apart, … times all of few rows, up to MaxRows at once.
template <class Lane, class E, int Entries, int MaxRows, class Sink>
inline void few_entries(const ProjectArgs& a, std::int64_t entry, std::int64_t apart, const Sink& sink) {
  struct Tiles {
    decltype(&tile_few<Lane, E, 1, Entries>) rows[MaxRows];
  };
  static constexpr Tiles kTiles = []<int... I>(std::integer_sequence<int, I...>) {
    return Tiles{{tile_few<Lane, E, I + 1, Entries>...}};
  }(std::make_integer_sequence<int, MaxRows>{});
  const auto* matrix = static_cast<const typename E::T*>(a.matrix.data) + entry * a.matrix.stride;
  const std::int64_t depth = a.depth / Lane::kNumbers, padded = round_up(depth, kWidth), block = block_depth(depth);
  const std::int64_t tile = few_tile(a.rows);
  float sums[MaxRows * Entries];
  for (std::int64_t row = 0; row < a.rows; row += tile) {
    const auto* x = reinterpret_cast<const float*>(a.packed) + row * padded;
    const std::int64_t rows = min64(tile, a.rows - row);
    for (std::int64_t begin = 0; begin < depth || begin == 0; begin += block)
      kTiles.rows[rows - 1](x + begin * rows, matrix + begin * Lane::kNumbers, apart * a.matrix.stride,
                            min64(block, depth - begin), begin == 0, sums);
    for (std::int64_t r = 0; r < rows; ++r)
      for (int e = 0; e < Entries; ++e) sink.one(row + r, entry + e * apart, sums[r * Entries + e]);
  }
}

// Entries [begin, end) times all of few rows, in as many streams as the kernel has entries: memory is read faster so,
// and an odd distance keeps them out of each other's banks.
template <class Lane, class E, int Entries, int MaxRows, class Sink>
void few_rows(const ProjectArgs& a, std::int64_t begin, std::int64_t end, const Sink& sink) {
  while (end - begin >= Entries) {
    const std::int64_t most = (end - begin) / Entries;
    const std::int64_t apart = most - (most > 1 && most % 2 == 0);
    for (std::int64_t i = 0; i < apart; ++i) few_entries<Lane, E, Entries, MaxRows>(a, begin + i, apart, sink);
    begin += apart * Entries;
  }
  for (; begin < end; ++begin) few_entries<Lane, E, 1, MaxRows>(a, begin, 1, sink);
}

}  // namespace
}  // namespace qtale::cpu::projection

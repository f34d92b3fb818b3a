// Few rows of x times a matrix: the lanes run along the depth, and the matrix is read where it lies, once.
#pragma once

#include "cpu/project_sink.inl"

namespace qtale::cpu::projection {
namespace {

// Adds one block of Rows rows of x times Entries rows of the matrix where they lie to sums, or begins them.
template <class E, int Rows, int Entries>
__attribute__((noipa)) void tile_few(const float* x, std::int64_t padded, const typename E::T* matrix,
                                     std::int64_t stride, std::int64_t depth, bool begins, float* sums) {
  VecF acc[Rows][Entries];
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    unroll<Entries>([&](auto e) QTALE_INLINE_LAMBDA { acc[r][e] = set1(0.0f); });
  });
  const auto step = [&](auto&& load) QTALE_INLINE_LAMBDA {
    VecF entry[Entries];
    unroll<Entries>([&](auto e) QTALE_INLINE_LAMBDA { entry[e] = load(e); });
    unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
      const VecF row = load_f32(x + r * padded);
      unroll<Entries>([&](auto e) QTALE_INLINE_LAMBDA { accumulate(acc[r][e], row, entry[e]); });
    });
  };
  const typename E::T* const end = matrix + depth / kWidth * kWidth;
#pragma GCC unroll 1
  for (; matrix != end; matrix += kWidth, x += kWidth) {
    unroll<Entries>([&](auto e) QTALE_INLINE_LAMBDA {
      __builtin_prefetch(reinterpret_cast<const char*>(matrix + e * stride) + kAhead);
    });
    step([&](auto e) QTALE_INLINE_LAMBDA { return E::load(matrix + e * stride); });
  }
  if (depth % kWidth != 0)
    step([&](auto e) QTALE_INLINE_LAMBDA { return load_part<E>(matrix + e * stride, depth % kWidth); });
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    unroll<Entries>([&](auto e) QTALE_INLINE_LAMBDA {
      float& sum = sums[r * Entries + e];
      sum = begins ? reduce_add(acc[r][e]) : sum + reduce_add(acc[r][e]);
    });
  });
}

// Entries [entry, entry + Entries) times all of few rows.
template <class E, int Entries, class Sink>
inline void few_rows(const ProjectArgs& a, std::int64_t entry, const Sink& sink) {
  static constexpr decltype(&tile_few<E, 1, Entries>) kTiles[kFewTile] = {
      tile_few<E, 1, Entries>, tile_few<E, 2, Entries>, tile_few<E, 3, Entries>, tile_few<E, 4, Entries>};
  const auto* matrix = static_cast<const typename E::T*>(a.matrix.data) + entry * a.matrix.stride;
  const std::int64_t padded = round_up(a.depth, kWidth), block = block_depth(a.depth);
  float sums[kFewTile * Entries];
  for (std::int64_t row = 0; row < a.rows; row += kFewTile) {
    const auto* x = reinterpret_cast<const float*>(a.packed) + row * padded;
    const std::int64_t rows = min64(kFewTile, a.rows - row);
    for (std::int64_t begin = 0; begin < a.depth || begin == 0; begin += block)
      kTiles[rows - 1](x + begin, padded, matrix + begin, a.matrix.stride, min64(block, a.depth - begin), begin == 0,
                       sums);
    for (std::int64_t r = 0; r < rows; ++r)
      for (int e = 0; e < Entries; ++e) sink.one(row + r, entry + e, sums[r * Entries + e]);
  }
}

}  // namespace
}  // namespace qtale::cpu::projection

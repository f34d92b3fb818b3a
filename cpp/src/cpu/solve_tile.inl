// Panels and the product that all weight solvers spend their time in, over the Vec of the including file's set.
#pragma once

#include "cpu/elements.inl"
#include "cpu/quad.h"
#include "cpu/solve.h"
#include "cpu/unroll.h"

namespace qtale::cpu::solving {
namespace {

// `entries` [steps][Tile] are broadcast, the vectors of a panel are read: one load per Tile multiply-adds.
template <int Tile, int Vecs>
__attribute__((noipa)) void tile_sums(const float* panel, const float* entries, std::int64_t steps, float* sums) {
  constexpr int kLanes = Vecs * kWidth;
  VecF acc[Tile][Vecs];
  unroll<Tile>([&](auto i)
                   QTALE_INLINE_LAMBDA { unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { acc[i][p] = set1(0.0f); }); });
#pragma GCC unroll 1
  for (const float* const end = panel + steps * kLanes; panel != end; panel += kLanes, entries += Tile) {
    VecF row[Vecs];
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { row[p] = load_f32(panel + p * kWidth); });
    unroll<Tile>([&](auto i) QTALE_INLINE_LAMBDA {
      const VecF entry = set1(entries[i]);
      unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { accumulate(acc[i][p], entry, row[p]); });
    });
  }
  unroll<Tile>([&](auto i) QTALE_INLINE_LAMBDA {
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA { store_f32(sums + i * kLanes + p * kWidth, acc[i][p]); });
  });
}

template <int Lanes>
void load_panel(const float* weight, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                const std::int32_t* position, float* panel) {
  const std::int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (std::int64_t r = 0; r < whole_rows; r += 4) {
    for (std::int64_t c = 0; c < whole_columns; c += 4) {
      const Quads quads = load_transposed(weight + r * stride + c, stride);
      for (int i = 0; i < 4; ++i) store_quad(panel + position[c + i] * Lanes + r, quads.row[i]);
    }
    for (std::int64_t c = whole_columns; c < columns; ++c)
      for (int i = 0; i < 4; ++i) panel[position[c] * Lanes + r + i] = weight[(r + i) * stride + c];
  }
  for (std::int64_t r = whole_rows; r < Lanes; ++r)
    for (std::int64_t c = 0; c < columns; ++c)
      panel[position[c] * Lanes + r] = r < rows ? weight[r * stride + c] : 0.0f;
}

}  // namespace
}  // namespace qtale::cpu::solving

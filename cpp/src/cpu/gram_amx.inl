// x^T x of bf16 numbers on AMX: products are exact, their sums float32.
#pragma once

#include <cstring>

#include "cpu/amx.inl"
#include "cpu/kernels.h"
#include "cpu/quad.h"

namespace qtale::cpu::gram {
namespace {

constexpr std::int64_t kWidth = 2 * kTileRows;       // columns of a panel
constexpr std::int64_t kTilePairs = kTileBytes / 4;  // pairs of numbers of a column: float32 in their places

// A tile of 16 columns by 32 rows, [16 pairs of rows][16 columns], and its transpose.
inline void pack_tile(const std::uint16_t* x, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                      float* lanes, float* entries) {
  auto* pairs = reinterpret_cast<std::uint32_t*>(lanes);
  std::memset(pairs, 0, kTileBytes);
  for (std::int64_t r = 0; r < rows; r += 2, x += 2 * stride, pairs += kTileRows) {
    const bool last = r + 1 == rows;
    const std::uint16_t* odd = last ? x : x + stride;
    const std::uint32_t kept = last ? 0x0000ffffu : 0xffffffffu;
    for (std::int64_t c = 0; c < columns; ++c) pairs[c] = (x[c] | std::uint32_t{odd[c]} << 16) & kept;
  }
  for (std::int64_t pair = 0; pair < kTileRows; pair += 4)
    for (std::int64_t c = 0; c < kTileRows; c += 4) {
      const Quads quads = load_transposed(lanes + pair * kTileRows + c, kTileRows);
      unroll<4>([&](auto i) QTALE_INLINE_LAMBDA { store_quad(entries + (c + i) * kTileRows + pair, quads.row[i]); });
    }
}

// A panel: [steps of 32 rows][2 tiles].
inline void pack(const std::uint16_t* x, std::int64_t stride, std::int64_t rows, std::int64_t columns, float* lanes,
                 float* entries) {
  for (std::int64_t r = 0; r < rows; r += kLineNumbers)
    for (std::int64_t c = 0; c < kWidth; c += kTileRows, lanes += kTilePairs, entries += kTilePairs) {
      const std::int64_t count = columns < c ? 0 : columns - c < kTileRows ? columns - c : kTileRows;
      pack_tile(x + r * stride + c, stride, rows - r < kLineNumbers ? rows - r : kLineNumbers, count, lanes, entries);
    }
}

inline void sums(const float* lanes, const float* entries, std::int64_t rows, float* sums) {
  TileShapes().use();
  unroll<4>([&](auto i) QTALE_INLINE_LAMBDA { zero_tile<i>(); });
  for (std::int64_t r = 0; r < rows; r += kLineNumbers, lanes += 2 * kTilePairs, entries += 2 * kTilePairs) {
    load_tile<4>(entries, kTileLine);
    load_tile<5>(entries + kTilePairs, kTileLine);
    load_tile<6>(lanes, kTileLine);
    load_tile<7>(lanes + kTilePairs, kTileLine);
    unroll<4>([&](auto i) QTALE_INLINE_LAMBDA { multiply_bf16_tiles<i, 4 + i / 2, 6 + i % 2>(); });
  }
  unroll<4>([&](auto i) QTALE_INLINE_LAMBDA {
    store_tile_sums<i>(sums + i / 2 * kTileRows * kWidth + i % 2 * kTileRows, kWidth * std::int64_t{sizeof(float)});
  });
  release_tiles();
}

constexpr GramKernel amx_kernel = {kWidth, kLineNumbers, pack, sums};

}  // namespace
}  // namespace qtale::cpu::gram

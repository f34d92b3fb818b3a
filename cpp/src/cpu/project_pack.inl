// The order in which products are summed, and x as the kernels read it: rows as they are for few of them, panels of as
// many rows as lanes for more.
//
// Few rows have the lanes along the depth, many rows have them along the rows; a sum is the same in both, bit for bit.
// Its order is that of few rows: the depth in blocks, in each block one sum for each kWidth-th element (a chain), which
// reduce_add adds up, and the blocks one after the other.
#pragma once

#include "cpu/elements.inl"
#include "cpu/kernels.h"
#include "cpu/quad.h"
#include "cpu/unroll.h"

namespace qtale::cpu::projection {
namespace {

constexpr std::int64_t kDepth = 640;   // of one block at most
constexpr std::int64_t kEntries = 96;  // of one tile: shared by all rows
constexpr int kFewRows = kWidth * 3 / 4;
constexpr int kFewTile = 6;                               // rows
constexpr int kStreamRows = kWidth >= 16 ? kFewTile : 2;  // that have the registers for four streams
constexpr int kHalvings = kWidth == 16 ? 4 : 3;
static_assert(kWidth == 1 << kHalvings);

inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b * b; }

// Depth in equal blocks of whole vectors; the same for every number of rows.
inline std::int64_t block_depth(std::int64_t depth) {
  const std::int64_t blocks = (depth + kDepth - 1) / kDepth;
  return blocks == 0 ? kWidth : round_up((depth + blocks - 1) / blocks, kWidth);
}

// Lane of the chain that comes in this place, or the place of a lane: in the order of reversed bits each sum of two
// chains, of two such sums and so on can be made as soon as both are there.
constexpr int reversed(int lane) {
  int out = 0;
  for (int bit = 0; bit < kHalvings; ++bit) out |= (lane >> bit & 1) << (kHalvings - 1 - bit);
  return out;
}

// Few rows in equal tiles.
inline std::int64_t few_tile(std::int64_t rows) {
  const std::int64_t tiles = (rows + kFewTile - 1) / kFewTile;
  return (rows + tiles - 1) / tiles;
}

template <int Vecs>
std::size_t packed_bytes(std::int64_t rows, std::int64_t depth) {
  const std::int64_t padded_rows = rows <= kFewRows ? rows : round_up(rows, Vecs * kWidth);
  return static_cast<std::size_t>(padded_rows * round_up(depth, kWidth)) * sizeof(float);
}

// One block of one panel: chains in their order, [steps][lanes] each.
template <int Panel>
void pack_block(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t depth, float* out) {
  const std::int64_t padded = round_up(depth, kWidth), steps = padded / kWidth;
  const auto place = [&](std::int64_t i) {
    return out + (reversed(static_cast<int>(i % kWidth)) * steps + i / kWidth) * Panel;
  };
  for (std::int64_t i = 0; i < padded; i += 4) {
    float* const to[4] = {place(i), place(i + 1), place(i + 2), place(i + 3)};
    for (std::int64_t lane = 0; lane < Panel; lane += 4) {
      if (lane + 4 <= rows && i + 4 <= depth) {
        const Quads columns = load_transposed(x + lane * stride + i, stride);
        unroll<4>([&](auto d) QTALE_INLINE_LAMBDA { store_quad(to[d] + lane, columns.row[d]); });
        continue;
      }
      for (int d = 0; d < 4; ++d)
        for (std::int64_t r = lane; r < lane + 4; ++r)
          to[d][r] = r < rows && i + d < depth ? x[r * stride + i + d] : 0.0f;
    }
  }
}

// One tile of few rows: [steps][rows][kWidth].
inline void pack_tile(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t depth, float* out) {
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t i = 0; i < depth; i += kWidth)
      store_f32(out + i * rows + r * kWidth,
                i + kWidth <= depth ? load_f32(x + r * stride + i) : load_part<F32>(x + r * stride + i, depth - i));
}

// Tiles of few rows, else panels of blocks; zeros fill the padding.
template <int Vecs>
void pack(const ProjectArgs& a, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kPanel = Vecs * kWidth;
  const std::int64_t padded = round_up(a.depth, kWidth), block = block_depth(a.depth);
  const auto* x = static_cast<const float*>(a.x.data);
  auto* out = reinterpret_cast<float*>(a.packed) + begin * padded;
  if (a.rows <= kFewRows) {
    const std::int64_t tile = few_tile(a.rows);
    for (std::int64_t r = begin; r < end; r += tile, out += tile * padded)
      pack_tile(x + r * a.x.stride, a.x.stride, min64(tile, end - r), a.depth, out);
    return;
  }
  for (std::int64_t r = begin; r < end; r += kPanel, out += padded * kPanel)
    for (std::int64_t i = 0; i < a.depth; i += block)
      pack_block<kPanel>(x + r * a.x.stride + i, a.x.stride, min64(kPanel, a.rows - r), min64(block, a.depth - i),
                         out + i * kPanel);
}

}  // namespace
}  // namespace qtale::cpu::projection

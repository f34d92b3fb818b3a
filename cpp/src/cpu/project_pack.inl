// The order in which products are summed, and x as the kernels read it: rows as they are for few of them, panels of as
// many rows as lanes for more. Depths are in lanes of the Lane that the kernels are made for, see project_lane.inl.
//
// Few rows have the lanes along the depth, many rows have them along the rows; a sum is the same in both, bit for bit.
// Its order is that of few rows: the depth in blocks, in each block one sum for each kWidth-th element (a chain), which
// reduce_add adds up, and the blocks one after the other.
#pragma once

#include "core/integers.h"
#include "cpu/kernels.h"
#include "cpu/project_lane.inl"
#include "cpu/quad.h"
#include "cpu/unroll.h"

namespace qtale::cpu::projection {
namespace {

constexpr std::int64_t kDepth = 640;   // of one block at most
constexpr std::int64_t kPiece = 64;    // of a block: what is made at once of lanes that are not as x has them
constexpr std::int64_t kEntries = 96;  // of one tile: shared by all rows
constexpr int kFewRows = kWidth * 3 / 4;
constexpr int kFewTile = 6;                               // rows
constexpr int kStreamRows = kWidth >= 16 ? kFewTile : 2;  // that have the registers for four streams
constexpr int kHalvings = kWidth == 16 ? 4 : 3;
static_assert(kWidth == 1 << kHalvings);

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

template <class Lane, int Vecs>
std::size_t packed_bytes(std::int64_t rows, std::int64_t depth) {
  const std::int64_t padded_rows = rows <= kFewRows ? rows : round_up(rows, Vecs * kWidth);
  return static_cast<std::size_t>(padded_rows * round_up(depth / Lane::kNumbers, kWidth)) * sizeof(float);
}

// Where lane i of a block of so many steps goes in a panel: chains in their order, [steps][rows] each.
template <int Panel>
float* place(float* block, std::int64_t steps, std::int64_t i) {
  return block + (reversed(static_cast<int>(i % kWidth)) * steps + i / kWidth) * Panel;
}

// Lanes [begin, end) of a block of one panel; x is what stands at `begin`, `depth` what is left of the rows there.
template <int Panel>
void pack_lanes(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t depth, std::int64_t begin,
                std::int64_t end, std::int64_t steps, float* block) {
  for (std::int64_t i = begin; i < end; i += 4, x += 4, depth -= 4) {
    float* const to[4] = {place<Panel>(block, steps, i), place<Panel>(block, steps, i + 1),
                          place<Panel>(block, steps, i + 2), place<Panel>(block, steps, i + 3)};
    for (std::int64_t lane = 0; lane < Panel; lane += 4) {
      if (lane + 4 <= rows && depth >= 4) {
        const Quads columns = load_transposed(x + lane * stride, stride);
        unroll<4>([&](auto d) QTALE_INLINE_LAMBDA { store_quad(to[d] + lane, columns.row[d]); });
        continue;
      }
      for (int d = 0; d < 4; ++d)
        for (std::int64_t r = lane; r < lane + 4; ++r) to[d][r] = r < rows && d < depth ? x[r * stride + d] : 0.0f;
    }
  }
}

// One block of one panel.
template <class Lane, int Panel>
void pack_block(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t depth, float* out) {
  const std::int64_t padded = round_up(depth, kWidth), steps = padded / kWidth;
  if constexpr (Lane::kNumbers == 1) {
    pack_lanes<Panel>(x, stride, rows, depth, 0, padded, steps, out);
  } else {
    alignas(64) float lanes[Panel * kPiece];
    for (std::int64_t i = 0; i < padded; i += kPiece) {
      const std::int64_t left = min64(kPiece, depth - i);
      for (std::int64_t r = 0; r < rows; ++r)
        make_lanes<Lane, F32>(x + r * stride + i * Lane::kNumbers, left, lanes + r * kPiece);
      pack_lanes<Panel>(lanes, kPiece, rows, left, i, min64(i + kPiece, padded), steps, out);
    }
  }
}

// One tile of few rows: [steps][rows][kWidth].
template <class Lane>
void pack_tile(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t depth, float* out) {
  for (std::int64_t r = 0; r < rows; ++r) make_lanes<Lane, F32>(x + r * stride, depth, out + r * kWidth, rows * kWidth);
}

// Tiles of few rows, else panels of blocks; zeros fill the padding.
template <class Lane, int Vecs>
void pack(const ProjectArgs& a, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kPanel = Vecs * kWidth;
  const std::int64_t depth = a.depth / Lane::kNumbers, padded = round_up(depth, kWidth), block = block_depth(depth);
  const auto* x = static_cast<const float*>(a.x.data);
  auto* out = reinterpret_cast<float*>(a.packed) + begin * padded;
  if (a.rows <= kFewRows) {
    const std::int64_t tile = few_tile(a.rows);
    for (std::int64_t r = begin; r < end; r += tile, out += tile * padded)
      pack_tile<Lane>(x + r * a.x.stride, a.x.stride, min64(tile, end - r), depth, out);
    return;
  }
  for (std::int64_t r = begin; r < end; r += kPanel, out += padded * kPanel)
    for (std::int64_t i = 0; i < depth; i += block)
      pack_block<Lane, kPanel>(x + r * a.x.stride + i * Lane::kNumbers, a.x.stride, min64(kPanel, a.rows - r),
                               min64(block, depth - i), out + i * kPanel);
}

}  // namespace
}  // namespace qtale::cpu::projection

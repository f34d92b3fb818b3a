// x as the products on AMX read it. Up to 32 rows are the columns of tiles, whose rows are entries of the matrix as
// they lie there; more are the rows of tiles, and the entries, of which each serves many rows, become the columns.
#pragma once

#include <cstring>

#include "cpu/amx.inl"
#include "cpu/project_bf16.inl"

namespace qtale::cpu::projection {
namespace {

constexpr std::int64_t kPanelRows = 2 * kTileRows;  // of x, that are multiplied at once
constexpr std::int64_t kFewLanes = 4;               // rows of x that have narrow tiles

// Up to 32 rows as columns [steps][tiles][16 pairs][lanes] of pairs, zeros behind the last number and, within a tile,
// the last row.
struct ColumnTiles {
  std::int64_t steps, tiles, lanes;

  ColumnTiles(std::int64_t rows, std::int64_t depth)
      : steps(ceil_div(depth, kLineNumbers)),
        tiles(rows > kTileRows ? 2 : 1),
        lanes(rows > kFewLanes ? kTileRows : kFewLanes) {}
  std::int64_t line() const { return lanes * std::int64_t{sizeof(float)}; }  // bytes
  std::int64_t tile_pairs() const { return kTileRows * lanes; }
  std::int64_t pairs() const { return steps * tiles * tile_pairs(); }
};

// More rows as tiles [blocks of the depth][panels][steps of the block][2][16 rows][32 numbers], zeros behind the last.
// A block of 32 entries stays in L1 with what one panel has of it.
struct RowTiles {
  static constexpr std::int64_t kBlockSteps = 9;
  std::int64_t rows, steps, block;

  RowTiles(std::int64_t x_rows, std::int64_t depth)
      : rows(round_up(x_rows, kPanelRows)),
        steps(std::max<std::int64_t>(1, ceil_div(depth, kLineNumbers))),
        block(ceil_div(steps, ceil_div(steps, kBlockSteps))) {}
  std::int64_t steps_at(std::int64_t step) const { return min64(block, steps - step); }
  // Numbers before a panel of the block that begins at `step`.
  std::int64_t offset(std::int64_t step, std::int64_t row) const {
    return (step * rows + steps_at(step) * row) * kLineNumbers;
  }
  std::int64_t bytes() const { return 2 * offset(steps, 0); }
};

inline bool are_columns(std::int64_t rows) { return rows <= kPanelRows; }

inline std::size_t amx_packed_bytes(std::int64_t rows, std::int64_t depth) {
  return static_cast<std::size_t>(are_columns(rows) ? ColumnTiles(rows, depth).pairs() * std::int64_t{sizeof(float)}
                                                    : RowTiles(rows, depth).bytes());
}

// Numbers of a line, of which `depth` are there.
template <class E>
QTALE_INLINE VecF load_line(const typename E::T* from, std::int64_t depth) {
  return depth >= kLineNumbers ? PairLane::load<E>(from) : load_lanes<PairLane, E>(from, depth / PairLane::kNumbers);
}

// Up to 16 rows of one step, at least one, as columns.
inline void pack_column_tile(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t depth,
                             std::int64_t lanes, float* to) {
  alignas(64) float pairs[kTileRows * kWidth];
  for (std::int64_t r = 0; r < rows; ++r) store_f32(pairs + r * kWidth, load_line<F32>(x + r * stride, depth));
  const std::int64_t whole = round_up(rows, 4);
  for (std::int64_t r = rows; r < whole; ++r) store_f32(pairs + r * kWidth, set1(0.0f));
  if (whole < lanes) std::memset(to, 0, static_cast<std::size_t>(kTileRows * lanes) * sizeof(float));
  for (std::int64_t pair = 0; pair < kTileRows; pair += 4)
    for (std::int64_t r = 0; r < whole; r += 4) {
      const Quads quads = load_transposed(pairs + r * kWidth + pair, kWidth);
      unroll<4>([&](auto i) QTALE_INLINE_LAMBDA { store_quad(to + (pair + i) * lanes + r, quads.row[i]); });
    }
}

inline void pack_columns(const ProjectArgs& a) {
  const ColumnTiles tiles(a.rows, a.depth);
  auto* to = reinterpret_cast<float*>(a.packed);
  for (std::int64_t step = 0; step < tiles.steps; ++step)
    for (std::int64_t r = 0; r < tiles.tiles * kTileRows; r += kTileRows, to += tiles.tile_pairs()) {
      const auto* x = static_cast<const float*>(a.x.data) + r * a.x.stride + step * kLineNumbers;
      const std::int64_t rows = min64(kTileRows, a.rows - r);
      if (rows > 0) pack_column_tile(x, a.x.stride, rows, a.depth - step * kLineNumbers, tiles.lanes, to);
    }
}

inline void pack_rows_of_tiles(const ProjectArgs& a, std::int64_t begin, std::int64_t end) {
  const RowTiles tiles(a.rows, a.depth);
  for (std::int64_t r = begin; r < round_up(end, kPanelRows); ++r)
    for (std::int64_t step = 0; step < tiles.steps; ++step) {
      const std::int64_t first = step / tiles.block * tiles.block, row = r % kPanelRows;
      auto* to = reinterpret_cast<std::uint16_t*>(a.packed) + tiles.offset(first, r - row) +
                 ((step - first) * kPanelRows + row) * kLineNumbers;
      const auto* x = static_cast<const float*>(a.x.data) + r * a.x.stride + step * kLineNumbers;
      _mm512_store_ps(to, r < a.rows ? load_line<F32>(x, a.depth - step * kLineNumbers) : set1(0.0f));
    }
}

inline void pack_tiles(const ProjectArgs& a, std::int64_t begin, std::int64_t end) {
  are_columns(a.rows) ? pack_columns(a) : pack_rows_of_tiles(a, begin, end);
}

template <class E>
const typename E::T* entry_at(const RowsIn& matrix, std::int64_t entry, std::int64_t step) {
  return static_cast<const typename E::T*>(matrix.data) + entry * matrix.stride + step * kLineNumbers;
}

}  // namespace
}  // namespace qtale::cpu::projection

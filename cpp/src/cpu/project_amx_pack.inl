// x as the products on AMX read it. Up to 32 rows are the columns of tiles, whose rows are entries of the matrix as
// they lie there; more are the rows of tiles, and the entries, of which each serves many rows, become the columns.
// Where the matrix lies as such columns, few rows are rows of tiles, too.
#pragma once

#include <cstring>

#include "cpu/amx.inl"
#include "cpu/project_bf16.inl"
#include "qtale/decoder_ops.h"

namespace qtale::cpu::projection {
namespace {

constexpr std::int64_t kPanelRows = 2 * kTileRows;  // of x, that are multiplied at once
constexpr std::int64_t kFewLanes = 4;               // rows of x that have narrow tiles
static_assert(kTileRows == kTileOutputs && kLineNumbers == kTileInputs);

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
// A block of 32 entries stays in L1 with what one panel has of it. What is not deep is one block, which leaves little
// room there for rows that pass by.
struct RowTiles {
  static constexpr std::int64_t kBlockSteps = 9, kWholeSteps = 18;
  std::int64_t rows, steps, block;

  RowTiles(std::int64_t x_rows, std::int64_t depth)
      : rows(round_up(x_rows, kPanelRows)),
        steps(std::max<std::int64_t>(1, ceil_div(depth, kLineNumbers))),
        block(is_whole() ? steps : ceil_div(steps, ceil_div(steps, kBlockSteps))) {}
  bool is_whole() const { return steps <= kWholeSteps; }
  std::int64_t steps_at(std::int64_t step) const { return min64(block, steps - step); }
  // Numbers before a panel of the block that begins at `step`.
  std::int64_t offset(std::int64_t step, std::int64_t row) const {
    return (step * rows + steps_at(step) * row) * kLineNumbers;
  }
  std::int64_t bytes() const { return 2 * offset(steps, 0); }
};

inline bool are_columns(const ProjectArgs& a) { return !a.tiled && a.rows <= kPanelRows; }

// For either form: columns never take more than rows.
inline std::size_t amx_packed_bytes(std::int64_t rows, std::int64_t depth) {
  return static_cast<std::size_t>(RowTiles(rows, depth).bytes());
}

// Numbers of a line, of which `depth` are there.
template <class E>
QTALE_INLINE VecF load_line(const typename E::T* from, std::int64_t depth) {
  return depth >= kLineNumbers ? PairLane::load<E>(from) : load_lanes<PairLane, E>(from, depth / PairLane::kNumbers);
}

// Up to 16 rows of one step, at least one, as columns.
template <class E>
void pack_column_tile(const typename E::T* x, std::int64_t stride, std::int64_t rows, std::int64_t depth,
                      std::int64_t lanes, float* to) {
  alignas(64) float pairs[kTileRows * kWidth];
  for (std::int64_t r = 0; r < rows; ++r) store_f32(pairs + r * kWidth, load_line<E>(x + r * stride, depth));
  const std::int64_t whole = round_up(rows, 4);
  for (std::int64_t r = rows; r < whole; ++r) store_f32(pairs + r * kWidth, set1(0.0f));
  if (whole < lanes) std::memset(to, 0, static_cast<std::size_t>(kTileRows * lanes) * sizeof(float));
  for (std::int64_t pair = 0; pair < kTileRows; pair += 4)
    for (std::int64_t r = 0; r < whole; r += 4) {
      const Quads quads = load_transposed(pairs + r * kWidth + pair, kWidth);
      unroll<4>([&](auto i) QTALE_INLINE_LAMBDA { store_quad(to + (pair + i) * lanes + r, quads.row[i]); });
    }
}

template <class E>
void pack_columns(const ProjectArgs& a) {
  const ColumnTiles tiles(a.rows, a.depth);
  auto* to = reinterpret_cast<float*>(a.packed);
  for (std::int64_t step = 0; step < tiles.steps; ++step)
    for (std::int64_t r = 0; r < tiles.tiles * kTileRows; r += kTileRows, to += tiles.tile_pairs()) {
      const auto* x = static_cast<const typename E::T*>(a.x.data) + r * a.x.stride + step * kLineNumbers;
      const std::int64_t rows = min64(kTileRows, a.rows - r);
      if (rows > 0) pack_column_tile<E>(x, a.x.stride, rows, a.depth - step * kLineNumbers, tiles.lanes, to);
    }
}

// Of the last panel also rows that are not there, as zeros, unless it is the only one.
template <class E>
void pack_rows_of_tiles(const ProjectArgs& a, std::int64_t begin, std::int64_t end) {
  const RowTiles tiles(a.rows, a.depth);
  const std::int64_t packed = a.rows <= kPanelRows ? end : round_up(end, kPanelRows);
  for (std::int64_t r = begin; r < packed; ++r)
    for (std::int64_t step = 0; step < tiles.steps; ++step) {
      const std::int64_t first = step / tiles.block * tiles.block, row = r % kPanelRows;
      auto* to = reinterpret_cast<std::uint16_t*>(a.packed) + tiles.offset(first, r - row) +
                 ((step - first) * kPanelRows + row) * kLineNumbers;
      const auto* x = static_cast<const typename E::T*>(a.x.data) + r * a.x.stride + step * kLineNumbers;
      _mm512_store_ps(to, r < a.rows ? load_line<E>(x, a.depth - step * kLineNumbers) : set1(0.0f));
    }
}

inline void pack_tiles(const ProjectArgs& a, std::int64_t begin, std::int64_t end) {
  with_type(a.x.dtype, [&](auto element) {
    using E = decltype(element);
    are_columns(a) ? pack_columns<E>(a) : pack_rows_of_tiles<E>(a, begin, end);
  });
}

template <class E>
const typename E::T* entry_at(const RowsIn& matrix, std::int64_t entry, std::int64_t step) {
  return static_cast<const typename E::T*>(matrix.data) + entry * matrix.stride + step * kLineNumbers;
}

// Four columns of 32-bit pairs of 16 lines, side by side; `to` may be the caller's memory, on no line.
QTALE_INLINE void transpose_pairs(const std::byte* from, std::int64_t stride, std::uint16_t* to) {
  const auto quad = [&](std::int64_t line) QTALE_INLINE_LAMBDA {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + line * stride));
  };
  __m512i lines[4];  // i, i + 4, i + 8 and i + 12
  unroll<4>([&](auto i) QTALE_INLINE_LAMBDA {
    lines[i] = _mm512_castsi128_si512(quad(i));
    lines[i] = _mm512_mask_broadcast_i32x4(lines[i], 0x00f0, quad(i + 4));
    lines[i] = _mm512_mask_broadcast_i32x4(lines[i], 0x0f00, quad(i + 8));
    lines[i] = _mm512_mask_broadcast_i32x4(lines[i], 0xf000, quad(i + 12));
  });
  const __m512i low01 = _mm512_unpacklo_epi32(lines[0], lines[1]), high01 = _mm512_unpackhi_epi32(lines[0], lines[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(lines[2], lines[3]), high23 = _mm512_unpackhi_epi32(lines[2], lines[3]);
  _mm512_storeu_si512(to, _mm512_unpacklo_epi64(low01, low23));
  _mm512_storeu_si512(to + kLineNumbers, _mm512_unpackhi_epi64(low01, low23));
  _mm512_storeu_si512(to + 2 * kLineNumbers, _mm512_unpacklo_epi64(high01, high23));
  _mm512_storeu_si512(to + 3 * kLineNumbers, _mm512_unpackhi_epi64(high01, high23));
}

// A tile of 16 lines of bf16 that become its columns.
QTALE_INLINE void make_tile(const void* from, std::int64_t stride, std::uint16_t* to) {
  for (std::int64_t c = 0; c < 4; ++c)
    transpose_pairs(static_cast<const std::byte*>(from) + 16 * c, stride, to + 4 * c * kLineNumbers);
}

inline void round_to_tiles(const RoundArgs& a, std::int64_t begin, std::int64_t end) {
  with_type(a.matrix.dtype, [&](auto element) {
    using E = decltype(element);
    alignas(64) std::uint16_t lines[kTileNumbers];
    for (std::int64_t entry = begin; entry < end; entry += kTileRows)
      for (std::int64_t step = 0; step * kLineNumbers < a.depth; ++step) {
        const auto* from = entry_at<E>(a.matrix, entry, step);
        for (std::int64_t i = 0; i < kTileRows; ++i)
          _mm512_store_ps(lines + i * kLineNumbers, PairLane::load<E>(from + i * a.matrix.stride));
        make_tile(lines, kTileLine, a.out + entry * a.depth + step * kTileNumbers);
      }
  });
}

inline void amx_round(const RoundArgs& a, std::int64_t begin, std::int64_t end) {
  (a.tiled ? round_to_tiles : round_rows)(a, begin, end);
}

}  // namespace
}  // namespace qtale::cpu::projection

// How a product is cut into tiles of a few activation rows and one 64-row panel.
#pragma once

#include <immintrin.h>

#include "cpu/activations.inl"

namespace qtale::cpu {
namespace {

constexpr int kRows = 64;
constexpr std::int64_t kFewRows = 24;
constexpr int kMaxTile = 6;  // activation rows of a tile: 24 accumulators leave room for the weights

// Part of a range: panels, rows or activation groups.
struct Span {
  std::int64_t begin, end;
};

// How far ahead of its loads a tile asks for the first and the second half of each step of weights.
struct Prefetch {
  std::int64_t low, high;
};
constexpr std::int64_t kAhead = 8192;
constexpr Prefetch kPrefetchAll{kAhead, kAhead};
constexpr std::int64_t kStretch = 17600;  // bytes of weights that several tiles share: two stretches fit into L1

// Of several tiles over one stretch of weights the first two ask for half of the next one each: asking for all of it in
// the first tile would fill the line buffers there and leave memory idle in the others. Below 4 bits there is so little
// to ask for that the first one does it alone.
inline Prefetch prefetch_share(const Layout& l, std::int64_t tile, std::int64_t tiles, std::int64_t stretch) {
  if (tiles == 1) return kPrefetchAll;
  if (l.num_bits < 4) return {tile == 0 ? stretch : 0, tile == 0 ? stretch : 0};
  return {tile == 0 ? stretch : 0, tile == 1 ? stretch : 0};
}

// Asks for a part of the next panel while this one is multiplied: its first tile would wait for memory otherwise.
inline void prefetch_part(const std::uint8_t* p, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p) + i, _MM_HINT_T1);
}

// Large float32 results bypass the caches: lines of y would be read from memory only to be overwritten.
inline bool streams(const RowsOut& y, std::int64_t rows, std::int64_t n) {
  constexpr std::int64_t kLarge = std::int64_t{8} << 20;
  return y.dtype == DType::f32 && rows * n * 4 >= kLarge && y.stride % 16 == 0 &&
         reinterpret_cast<std::uintptr_t>(y.data) % 64 == 0;
}

// Asks for the lines of y that a tile will write: a store waits for its line, and others queue behind it.
inline void claim_outputs(const MatmulArgs& a, std::int64_t panel, std::int64_t m, std::int64_t rows) {
  const std::int64_t size = size_of(a.y.dtype);
  const std::int64_t col = panel * kRows, bytes = min64(kRows, a.layout->n - col) * size;
  for (std::int64_t i = 0; i < rows; ++i) {
    const char* y = static_cast<const char*>(a.y.data) + ((m + i) * a.y.stride + col) * size;
    for (std::int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(y + at, 1);
    __builtin_prefetch(y + bytes - 1, 1);
  }
}

// Rows of finished sums [rows][64] of one panel to y.
inline void store_tile(const MatmulArgs& a, std::int64_t panel, std::int64_t m, std::int64_t rows, const float* out,
                       bool stream) {
  const std::int64_t col = panel * kRows, count = min64(kRows, a.layout->n - col);
  for (std::int64_t i = 0; i < rows; ++i) {
    if (!stream || count < kRows) {
      store_outputs(a, m + i, col, out + i * kRows, count);
      continue;
    }
    float* y = static_cast<float*>(a.y.data) + (m + i) * a.y.stride + col;
    for (int p = 0; p < kRows; p += 16) {
      const __m512 v = _mm512_load_ps(out + i * kRows + p);
      _mm512_stream_ps(y + p, a.bias ? _mm512_add_ps(v, _mm512_loadu_ps(a.bias + col + p)) : v);
    }
  }
}

// Few rows: memory is the limit, so all tiles share each stretch of weights while the next one is on its way.
template <class Tile, class Finish>
inline void run_few_rows(const MatmulArgs& a, Span panels, Span rows, std::int64_t groups, std::int64_t tile_rows,
                         Tile&& tile, Finish&& finish) {
  alignas(64) float out[kFewRows * kRows];
  if (groups == 0) std::memset(out, 0, sizeof out);  // no group begins the sums of a weight without inputs
  const std::int64_t count = rows.end - rows.begin;
  const std::int64_t tiles = (count + tile_rows - 1) / tile_rows;
  const std::int64_t group_bytes = groups == 0 ? 1 : a.layout->panel_bytes / groups;
  const std::int64_t step = tiles == 1 ? groups : group_bytes > kStretch ? 1 : kStretch / group_bytes;
  for (std::int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (std::int64_t g = 0; g < groups; g += step)
      for (std::int64_t m = 0, n = 0, i = 0; m < count; m += n, ++i) {
        n = next_tile(count - m, tile_rows);
        tile(panel, rows.begin + m, n, Span{g, min64(groups, g + step)},
             prefetch_share(*a.layout, i, tiles, step * group_bytes), out + m * kRows);
      }
    finish(panel, rows.begin, count, out);
    store_tile(a, panel, rows.begin, count, out, false);
  }
}

// Many rows: each tile runs through the whole panel, which stays in L2.
template <class Tile, class Finish>
inline void run_many_rows(const MatmulArgs& a, Span panels, Span rows, std::int64_t groups, std::int64_t tile_rows,
                          Tile&& tile, Finish&& finish) {
  const Layout& l = *a.layout;
  alignas(64) float out[kMaxTile * kRows];
  if (groups == 0) std::memset(out, 0, sizeof out);
  const std::int64_t tiles = (rows.end - rows.begin + tile_rows - 1) / tile_rows;
  const bool stream = streams(a.y, a.rows, l.n);
  const std::int64_t part = (l.panel_bytes / tiles + 63) / 64 * 64;
  for (std::int64_t panel = panels.begin; panel < panels.end; ++panel) {
    std::int64_t ahead = panel + 1 < l.panels ? 0 : l.panel_bytes;
    for (std::int64_t m = rows.begin, n = 0; m < rows.end; m += n) {
      n = next_tile(rows.end - m, tile_rows);
      const std::int64_t bytes = min64(part, l.panel_bytes - ahead);
      prefetch_part(a.panels + (panel + 1) * l.panel_bytes + ahead, bytes);
      ahead += bytes;
      if (!stream) claim_outputs(a, panel, m, n);
      tile(panel, m, n, Span{0, groups}, kPrefetchAll, out);
      finish(panel, m, n, out);
      store_tile(a, panel, m, n, out, stream);
    }
  }
  if (stream) _mm_sfence();
}

// tile(panel, first row, rows, groups, prefetch, out) adds groups to out [rows][64], which group 0 begins anew;
// finish(panel, first row, rows, out) ends it.
template <class Tile, class Finish>
inline void run_tiles(const MatmulArgs& a, Span panels, Span rows, std::int64_t groups, std::int64_t tile_rows,
                      Tile&& tile, Finish&& finish) {
  if (rows.end - rows.begin <= kFewRows) {
    run_few_rows(a, panels, rows, groups, tile_rows, tile, finish);
  } else {
    run_many_rows(a, panels, rows, groups, tile_rows, tile, finish);
  }
}

}  // namespace
}  // namespace qtale::cpu

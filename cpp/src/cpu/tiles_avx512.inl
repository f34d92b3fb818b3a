// How a product is cut into tiles of a few activation rows and one 64-row panel, or half of it.
#pragma once

#include <immintrin.h>

#include "cpu/activations.inl"

namespace qtale::cpu {
namespace {

constexpr int kRows = 64;
constexpr std::int64_t kFewRows = 24;
constexpr int kMaxTile = 6;       // rows of codes of a tile: 24 accumulators leave room for the weights
constexpr int kMaxHalfTile = 13;  // of tiles of half a panel, whose 26 accumulators leave less

// Part of a range: panels, rows or activation groups.
struct Span {
  std::int64_t begin, end;
};

// Memory that a tile asks for: for every 64 bytes of weights that it reads from `from` on, `pace` bytes from `to` on.
struct Prefetch {
  const std::uint8_t* from;
  const std::uint8_t* to;
  std::int64_t pace;
  const std::uint8_t* at(const std::uint8_t* weights) const { return to + (((weights - from) * pace) >> 6); }
};
// QTALE_FAR_MEMORY: for CPUs with more latency than their L1 has line buffers for.
#ifdef QTALE_FAR_MEMORY
// Bytes ahead of the weights in use. Tiles of few rows ask twice; larger ones have no register left for that.
constexpr std::int64_t kAhead = 5120, kNear = 2560, kAheadOnly = 3072;
// Lines of y that are fetched among those of the weights cost more than ten times their bytes.
constexpr bool kStreamFewRows = true;
#else
constexpr std::int64_t kAhead = 8192, kNear = 0, kAheadOnly = kAhead;
constexpr bool kStreamFewRows = false;
#endif
constexpr bool asks_twice(std::int64_t tile_rows) { return kNear > 0 && tile_rows <= 4; }
inline Prefetch prefetch_ahead(const std::uint8_t* weights, std::int64_t tile_rows) {
  return {weights, weights + (asks_twice(tile_rows) ? kAhead : kAheadOnly), 64};
}

// One of several tiles over `size` bytes of weights asks for its share of the `next` bytes behind them. If the first
// tile asked for all, it would wait for line buffers and leave memory idle in the others.
inline Prefetch prefetch_share(const std::uint8_t* weights, std::int64_t size, std::int64_t next, std::int64_t tile,
                               std::int64_t tiles) {
  const std::int64_t pace = (64 * next + size * tiles - 1) / (size * tiles);
  return {weights, weights + size + ((tile * size * pace) >> 6), pace};
}

// Bytes of weights that several tiles share. Two stretches fit into any L2; those of 8 bits fit into L1, because memory
// is their limit and reading them from L2 would get in its way.
constexpr std::int64_t stretch_bytes(int num_bits) { return num_bits == 8 ? 17600 : 68000; }

inline bool can_stream(const RowsOut& y) {
  return y.dtype == DType::f32 && y.stride % 16 == 0 && reinterpret_cast<std::uintptr_t>(y.data) % 64 == 0;
}

// Large float32 results bypass the caches: lines of y would be read from memory only to be overwritten.
inline bool streams(const RowsOut& y, std::int64_t rows, std::int64_t n) {
  constexpr std::int64_t kLarge = std::int64_t{8} << 20;
  return rows * n * 4 >= kLarge && can_stream(y);
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

// How rows and a panel are cut into tiles: at most `rows` activation rows, of `planes` rows of codes, by 1 / `parts` of
// the panel.
struct TileCut {
  std::int64_t rows;
  int parts = 1;
  int planes = 1;
  std::int64_t tiles(std::int64_t count) const { return (count + rows - 1) / rows * parts; }
};

// Few rows: all tiles share each stretch of weights while the next one is on its way.
template <class Tile, class Finish>
inline void run_few_rows(const MatmulArgs& a, Span panels, Span rows, std::int64_t groups, TileCut cut, Tile&& tile,
                         Finish&& finish) {
  alignas(64) float out[kFewRows * kRows];
  if (groups == 0) std::memset(out, 0, sizeof out);  // no group begins the sums of a weight without inputs
  const std::int64_t count = rows.end - rows.begin, panel_bytes = a.layout->panel_bytes;
  const std::int64_t tiles = cut.tiles(count), most = stretch_bytes(a.layout->num_bits);
  const std::int64_t stretches = tiles == 1 ? 1 : (panel_bytes + most - 1) / most;
  const std::int64_t step = (groups + stretches - 1) / stretches;
  const bool stream = kStreamFewRows && can_stream(a.y);
  for (std::int64_t panel = panels.begin; panel < panels.end; ++panel) {
    if (!stream) claim_outputs(a, panel, rows.begin, count);
    for (std::int64_t g = 0; g < groups; g += step) {
      const std::int64_t end = min64(groups, g + step);
      const std::int64_t after = end < groups ? min64(groups, end + step) - end : panel + 1 < panels.end ? step : 0;
      const std::uint8_t* weights = a.panels + panel * panel_bytes + panel_bytes * g / groups;
      const std::int64_t size = panel_bytes * (end - g) / groups, next = panel_bytes * after / groups;
      for (std::int64_t m = 0, n = 0, i = 0; m < count; m += n) {
        n = next_tile(count - m, cut.rows);
        for (int part = 0; part < cut.parts; ++part, ++i) {
          const Prefetch prefetch =
              tiles == 1 ? prefetch_ahead(weights, n * cut.planes) : prefetch_share(weights, size, next, i, tiles);
          tile(panel, rows.begin + m, n, part, Span{g, end}, prefetch, out + m * kRows);
        }
      }
    }
    finish(panel, rows.begin, count, out);
    store_tile(a, panel, rows.begin, count, out, stream);
  }
  if (stream) _mm_sfence();
}

// Many rows: each tile runs through the whole panel, which stays in L2.
template <class Tile, class Finish>
inline void run_many_rows(const MatmulArgs& a, Span panels, Span rows, std::int64_t groups, TileCut cut, Tile&& tile,
                          Finish&& finish) {
  const Layout& l = *a.layout;
  alignas(64) float out[kMaxHalfTile * kRows];
  if (groups == 0) std::memset(out, 0, sizeof out);
  const std::int64_t tiles = cut.tiles(rows.end - rows.begin);
  const bool stream = streams(a.y, a.rows, l.n);
  for (std::int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const std::uint8_t* weights = a.panels + panel * l.panel_bytes;
    const std::int64_t next = panel + 1 < panels.end ? l.panel_bytes : 0;
    for (std::int64_t m = rows.begin, n = 0, i = 0; m < rows.end; m += n) {
      n = next_tile(rows.end - m, cut.rows);
      if (!stream) claim_outputs(a, panel, m, n);
      for (int part = 0; part < cut.parts; ++part, ++i)
        tile(panel, m, n, part, Span{0, groups}, prefetch_share(weights, l.panel_bytes, next, i, tiles), out);
      finish(panel, m, n, out);
      store_tile(a, panel, m, n, out, stream);
    }
  }
  if (stream) _mm_sfence();
}

// tile(panel, first row, rows, part of the panel, groups, prefetch, out) adds groups to out [rows][64], which group 0
// begins anew; finish(panel, first row, rows, out) ends it.
template <class Tile, class Finish>
inline void run_tiles(const MatmulArgs& a, Span panels, Span rows, std::int64_t groups, TileCut cut, Tile&& tile,
                      Finish&& finish) {
  if (rows.end - rows.begin <= kFewRows) {
    run_few_rows(a, panels, rows, groups, cut, tile, finish);
  } else {
    run_many_rows(a, panels, rows, groups, cut, tile, finish);
  }
}

}  // namespace
}  // namespace qtale::cpu

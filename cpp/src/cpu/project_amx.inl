// x times a matrix on AMX, both rounded to bf16. Entries of the matrix are the rows of tiles, as they lie there, and
// rows of x the columns of others; a product is summed along the depth in tiles, for few rows as for many.
#pragma once

#include <cstring>

#include "cpu/amx.inl"
#include "cpu/project_bf16.inl"

namespace qtale::cpu::projection {
namespace {

constexpr std::int64_t kTileDepth = kTileLine / 2;    // numbers of a tile's line
constexpr std::int64_t kTileEntries = 2 * kTileRows;  // that are multiplied at once
constexpr std::int64_t kPanelRows = 2 * kTileRows;    // of x, likewise
constexpr std::int64_t kPanelSums = kTileEntries * kPanelRows;
constexpr std::int64_t kFewLanes = 4;                          // rows of x that have narrow tiles
constexpr std::int64_t kSharedSteps = 8, kStreamedSteps = 32;  // tiles of the depth that wait for all rows
constexpr std::int64_t kAheadSteps = 16;                       // that few rows ask for in advance
constexpr int kEntryTile = 4, kRowTile = 6;                    // the first of two; those before hold sums

// Rows of x in panels [steps][tiles][16 pairs][lanes] of pairs, zeros behind the last row and number.
struct TilePanels {
  std::int64_t steps, tiles, lanes;

  TilePanels(std::int64_t rows, std::int64_t depth)
      : steps((depth + kTileDepth - 1) / kTileDepth),
        tiles(rows > kTileRows ? 2 : 1),
        lanes(rows > kFewLanes ? kTileRows : kFewLanes) {}
  std::int64_t tile_pairs() const { return kTileRows * lanes; }
  std::int64_t panel_pairs() const { return steps * tiles * tile_pairs(); }
};

inline std::size_t tile_packed_bytes(std::int64_t rows, std::int64_t depth) {
  const std::int64_t panels = (rows + kPanelRows - 1) / kPanelRows;
  return static_cast<std::size_t>(panels * TilePanels(rows, depth).panel_pairs()) * sizeof(float);
}

// Numbers of a line, of which `depth` are there.
template <class E>
QTALE_INLINE VecF load_line(const typename E::T* from, std::int64_t depth) {
  return depth >= kTileDepth ? PairLane::load<E>(from) : load_lanes<PairLane, E>(from, depth / PairLane::kNumbers);
}

// Up to 16 rows of one step, at least one.
inline void pack_row_tile(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t depth,
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

inline void pack_row_tiles(const ProjectArgs& a, std::int64_t begin, std::int64_t end) {
  const TilePanels panels(a.rows, a.depth);
  auto* to = reinterpret_cast<float*>(a.packed) + begin / kPanelRows * panels.panel_pairs();
  for (std::int64_t row = begin; row < end; row += kPanelRows)
    for (std::int64_t step = 0; step < panels.steps; ++step)
      for (std::int64_t r = row; r < row + panels.tiles * kTileRows; r += kTileRows, to += panels.tile_pairs()) {
        const auto* x = static_cast<const float*>(a.x.data) + r * a.x.stride + step * kTileDepth;
        const std::int64_t rows = min64(kTileRows, a.rows - r);
        if (rows > 0) pack_row_tile(x, a.x.stride, rows, a.depth - step * kTileDepth, panels.lanes, to);
      }
}

// Entries [begin, end) times all rows: 32 entries at a time, whose numbers are copied to tiles for some steps of the
// depth, as many as L1 keeps while all rows meet them.
template <class E, class Sink>
class TileProduct {
 public:
  TileProduct(const ProjectArgs& a, std::byte* scratch, const Sink& sink)
      : a_(a),
        sink_(sink),
        x_(a.rows, a.depth),
        block_(a.rows > kPanelRows ? kSharedSteps : kStreamedSteps),
        entries_(reinterpret_cast<std::uint16_t*>(scratch)),
        sums_(reinterpret_cast<float*>(scratch + kEntryBytes)) {}

  static std::size_t scratch_bytes(std::int64_t rows) {
    const std::int64_t panels = (rows + kPanelRows - 1) / kPanelRows;
    return kEntryBytes + static_cast<std::size_t>(panels * kPanelSums) * sizeof(float);
  }

  void run(std::int64_t begin, std::int64_t end) const {
    const TilesInUse tiles(shapes());
    for (; begin < end; begin += kTileEntries) run_group(begin, min64(kTileEntries, end - begin));
  }

 private:
  static constexpr std::size_t kEntryBytes = 2 * kStreamedSteps * kTileBytes;

  TileShapes shapes() const {
    TileShapes shapes;
    if (x_.lanes < kTileRows)
      for (const int tile : {0, 1, 2, 3, kRowTile, kRowTile + 1}) shapes.set(tile, kTileRows, 4 * x_.lanes);
    return shapes;
  }

  const typename E::T* at(std::int64_t entry, std::int64_t step) const {
    return static_cast<const typename E::T*>(a_.matrix.data) + entry * a_.matrix.stride + step * kTileDepth;
  }

  void run_group(std::int64_t entry, std::int64_t count) const {
    const std::int64_t streamed = stream_entries(entry, count);
    for (std::int64_t step = streamed; step < x_.steps || step == streamed; step += block_) {
      const std::int64_t steps = min64(block_, x_.steps - step);
      const bool last = step + steps >= x_.steps;
      copy_entries(entry, count, step, steps, last ? at(entry + kTileEntries, 0) : at(entry, step + steps));
      float* sums = sums_;
      for (std::int64_t row = 0; row < a_.rows; row += kPanelRows, sums += kPanelSums) {
        const std::int64_t rows = min64(kPanelRows, a_.rows - row);
        const Lines lines{entries_, kTileLine, steps * (kTileBytes / 2), kTileBytes / 2};
        multiply<false>({lines, lines, row, step, steps}, count, rows, sums);
        if (last) sink_.template panel<2>(sums, entry, count, row, rows);
      }
    }
  }

  // Few rows wait for memory: entries are multiplied where they lie, for as many steps as are whole.
  std::int64_t stream_entries(std::int64_t entry, std::int64_t count) const {
    if constexpr (std::is_same_v<E, Bf16>) {
      if (a_.rows > kPanelRows || count % kTileRows != 0) return 0;
      const std::int64_t whole = a_.depth / kTileDepth, early = min64(kAheadSteps, whole);
      const auto lines = [&](std::int64_t from, std::int64_t step) {
        return Lines{at(from, step), a_.matrix.stride * 2, kTileRows * a_.matrix.stride, kTileDepth};
      };
      multiply<true>({lines(entry, 0), lines(entry, early), 0, 0, whole - early}, count, a_.rows, sums_);
      multiply<true>({lines(entry, whole - early), lines(entry + kTileEntries, 0), 0, whole - early, early}, count,
                     a_.rows, sums_);
      return whole;
    }
    return 0;
  }

  // To [2][steps][16][32]. Asks for the same entries of what comes next.
  void copy_entries(std::int64_t entry, std::int64_t count, std::int64_t step, std::int64_t steps,
                    const typename E::T* next) const {
    for (std::int64_t e = 0; e < count; ++e, next += a_.matrix.stride) {
      const typename E::T* from = at(entry + e, step);
      std::uint16_t* to = entries_ + (e / kTileRows * steps * kTileRows + e % kTileRows) * kTileDepth;
      for (std::int64_t s = 0; s < steps; ++s, from += kTileDepth, to += kTileBytes / 2) {
        for (std::int64_t i = 0; i < kTileDepth; i += 64 / std::int64_t{sizeof(*from)})
          __builtin_prefetch(next + s * kTileDepth + i, 0, 2);
        _mm512_store_ps(to, load_line<E>(from, a_.depth - (step + s) * kTileDepth));
      }
    }
  }

  // Tiles of entries in steps of the depth, all distances in numbers but the first, which is in bytes.
  struct Lines {
    const std::uint16_t* at;
    std::int64_t line, tile, step;
  };
  struct Factors {
    Lines entries, ahead;  // what is multiplied, and what is asked for meanwhile
    std::int64_t row, step, steps;
  };

  template <bool Asks>
  void multiply(const Factors& f, std::int64_t count, std::int64_t rows, float* sums) const {
    if (count > kTileRows) {
      rows > kTileRows ? multiply_panel<2, 2, Asks>(f, sums) : multiply_panel<2, 1, Asks>(f, sums);
    } else {
      rows > kTileRows ? multiply_panel<1, 2, Asks>(f, sums) : multiply_panel<1, 1, Asks>(f, sums);
    }
  }

  template <int Entries, int Rows, bool Asks>
  void multiply_panel(const Factors& f, float* sums) const {
    constexpr std::int64_t kStride = kPanelRows * std::int64_t{sizeof(float)};
    const auto each_sum = [&](auto&& fn) QTALE_INLINE_LAMBDA {
      unroll<Entries * Rows>([&](auto i) QTALE_INLINE_LAMBDA {
        constexpr int kEntries = i / Rows, kRows = i % Rows;
        fn(i, std::integral_constant<int, kEntries>{}, std::integral_constant<int, kRows>{});
      });
    };
    each_sum([&](auto i, auto e, auto r) QTALE_INLINE_LAMBDA {
      f.step == 0 ? zero_tile<i>() : load_tile<i>(sums + e * kTileRows * kPanelRows + r * kTileRows, kStride);
    });
    const auto* x = reinterpret_cast<const float*>(a_.packed) + f.row / kPanelRows * x_.panel_pairs() +
                    f.step * x_.tiles * x_.tile_pairs();
    const std::int64_t line = x_.lanes * std::int64_t{sizeof(float)};
    Lines entries = f.entries, ahead = f.ahead;
    for (std::int64_t s = 0; s < f.steps; ++s, entries.at += entries.step, x += x_.tiles * x_.tile_pairs()) {
      unroll<Entries>([&](auto e) QTALE_INLINE_LAMBDA {
        load_tile<kEntryTile + e>(entries.at + e * entries.tile, entries.line);
        if constexpr (Asks) ask(ahead.at + e * ahead.tile, ahead.line);
      });
      if constexpr (Asks) ahead.at += ahead.step;
      unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA { load_tile<kRowTile + r>(x + r * x_.tile_pairs(), line); });
      each_sum([&](auto i, auto e, auto r)
                   QTALE_INLINE_LAMBDA { multiply_bf16_tiles<i, kEntryTile + e, kRowTile + r>(); });
    }
    each_sum([&](auto i, auto e, auto r) QTALE_INLINE_LAMBDA {
      store_tile_sums<i>(sums + e * kTileRows * kPanelRows + r * kTileRows, kStride);
    });
  }

  QTALE_INLINE static void ask(const std::uint16_t* lines, std::int64_t stride) {
    const char* at = reinterpret_cast<const char*>(lines);
    for (int i = 0; i < kTileRows; ++i, at += stride) __builtin_prefetch(at, 0, 2);
  }

  const ProjectArgs& a_;
  const Sink& sink_;
  TilePanels x_;
  std::int64_t block_;      // steps
  std::uint16_t* entries_;  // of some steps
  float* sums_;             // [panels][kTileEntries][kPanelRows]
};

template <class Sink>
void run_tiles(const ProjectArgs& a, std::int64_t begin, std::int64_t end, std::byte* scratch, const Sink& sink) {
  with_type(a.matrix.dtype,
            [&](auto element) { TileProduct<decltype(element), Sink>(a, scratch, sink).run(begin, end); });
}
inline void find_in_tiles(const ProjectArgs& a, std::int64_t begin, std::int64_t end, std::byte* scratch,
                          Candidates& c) {
  run_tiles(a, begin, end, scratch, Offer{c});
}
inline void store_tiles(const ProjectArgs& a, std::int64_t begin, std::int64_t end, std::byte* scratch,
                        const ProjectOut& out) {
  run_tiles(a, begin, end, scratch, Store{out});
}

constexpr ProjectKernel tile_kernel = {
    tile_packed_bytes, pack_row_tiles, TileProduct<Bf16, Store>::scratch_bytes, find_in_tiles, store_tiles, kPanelRows,
    kTileEntries,      kTileEntries,
};

}  // namespace
}  // namespace qtale::cpu::projection

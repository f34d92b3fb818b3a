// x times a matrix on AMX, both rounded to bf16. Entries of the matrix are the rows of tiles, as they lie there, and
// rows of x the columns of others; a product is summed along the depth in tiles, for few rows as for many.
#pragma once

#include <cstring>

#include "cpu/amx.inl"
#include "cpu/project_bf16.inl"

namespace qtale::cpu::projection {
namespace {

constexpr std::int64_t kTileEntries = 2 * kTileRows;  // that are multiplied at once
constexpr std::int64_t kPanelRows = 2 * kTileRows;    // of x, likewise
constexpr std::int64_t kPanelSums = kTileEntries * kPanelRows;
constexpr std::int64_t kFewLanes = 4;        // rows of x that have narrow tiles
constexpr std::int64_t kSharedSteps = 8;     // tiles of the depth that L1 keeps while all rows meet them
constexpr std::int64_t kTileAhead = 512;     // bytes of each stream that are asked for in advance
constexpr int kEntryTile = 4, kRowTile = 6;  // the first of two; those before hold sums

// Rows of x in panels [steps][tiles][16 pairs][lanes] of pairs, zeros behind the last number and, within a tile, the
// last row.
struct TilePanels {
  std::int64_t steps, tiles, lanes;

  TilePanels(std::int64_t rows, std::int64_t depth)
      : steps(ceil_div(depth, kLineNumbers)),
        tiles(rows > kTileRows ? 2 : 1),
        lanes(rows > kFewLanes ? kTileRows : kFewLanes) {}
  std::int64_t line() const { return lanes * std::int64_t{sizeof(float)}; }  // bytes
  std::int64_t tile_pairs() const { return kTileRows * lanes; }
  std::int64_t panel_pairs() const { return steps * tiles * tile_pairs(); }
};

inline std::size_t amx_packed_bytes(std::int64_t rows, std::int64_t depth) {
  const std::int64_t panels = ceil_div(rows, kPanelRows);
  return static_cast<std::size_t>(panels * TilePanels(rows, depth).panel_pairs()) * sizeof(float);
}

// Numbers of a line, of which `depth` are there.
template <class E>
QTALE_INLINE VecF load_line(const typename E::T* from, std::int64_t depth) {
  return depth >= kLineNumbers ? PairLane::load<E>(from) : load_lanes<PairLane, E>(from, depth / PairLane::kNumbers);
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
        const auto* x = static_cast<const float*>(a.x.data) + r * a.x.stride + step * kLineNumbers;
        const std::int64_t rows = min64(kTileRows, a.rows - r);
        if (rows > 0) pack_row_tile(x, a.x.stride, rows, a.depth - step * kLineNumbers, panels.lanes, to);
      }
}

inline TileShapes product_shapes(const TilePanels& x) {
  TileShapes shapes;
  if (x.lanes < kTileRows)
    for (const int tile : {0, 1, 2, 3, kRowTile, kRowTile + 1}) shapes.set(tile, kTileRows, 4 * x.lanes);
  return shapes;
}

template <class E>
const typename E::T* entry_at(const ProjectArgs& a, std::int64_t entry, std::int64_t step) {
  return static_cast<const typename E::T*>(a.matrix.data) + entry * a.matrix.stride + step * kLineNumbers;
}

// Entries times all rows: 32 entries at a time, whose numbers are copied to tiles for some steps of
// the depth.
template <class E>
class ManyRowTiles {
 public:
  ManyRowTiles(const ProjectArgs& a, std::byte* scratch, const Store& sink)
      : a_(a),
        sink_(sink),
        x_(a.rows, a.depth),
        entries_(reinterpret_cast<std::uint16_t*>(scratch)),
        sums_(reinterpret_cast<float*>(scratch + kEntryBytes)) {}

  static constexpr std::size_t kEntryBytes = 2 * kSharedSteps * kTileBytes;
  static std::size_t scratch_bytes(std::int64_t rows) {
    const std::int64_t panels = ceil_div(rows, kPanelRows);
    return kEntryBytes + static_cast<std::size_t>(panels * kPanelSums) * sizeof(float);
  }

  void run(std::int64_t begin, std::int64_t end) const {
    product_shapes(x_).use();
    for (; begin < end; begin += kTileEntries) run_group(begin, min64(kTileEntries, end - begin));
    release_tiles();
  }

 private:
  void run_group(std::int64_t entry, std::int64_t count) const {
    for (std::int64_t step = 0; step < x_.steps || step == 0; step += kSharedSteps) {
      const std::int64_t steps = min64(kSharedSteps, x_.steps - step);
      const bool last = step + steps >= x_.steps;
      const auto* next = last ? entry_at<E>(a_, entry + kTileEntries, 0) : entry_at<E>(a_, entry, step + steps);
      copy_entries(entry, count, step, steps, next);
      float* sums = sums_;
      const auto* x = reinterpret_cast<const float*>(a_.packed) + step * x_.tiles * x_.tile_pairs();
      for (std::int64_t row = 0; row < a_.rows; row += kPanelRows, sums += kPanelSums, x += x_.panel_pairs()) {
        const std::int64_t rows = min64(kPanelRows, a_.rows - row);
        multiply(count, rows, x, steps, step == 0, sums);
        if (last) sink_.panel<2>(sums, entry, count, row, rows);
      }
    }
  }

  // To [2][steps][16][32]. Asks for the same entries of what comes next.
  void copy_entries(std::int64_t entry, std::int64_t count, std::int64_t step, std::int64_t steps,
                    const typename E::T* next) const {
    for (std::int64_t e = 0; e < count; ++e, next += a_.matrix.stride) {
      const typename E::T* from = entry_at<E>(a_, entry + e, step);
      std::uint16_t* to = entries_ + (e / kTileRows * steps * kTileRows + e % kTileRows) * kLineNumbers;
      for (std::int64_t s = 0; s < steps; ++s, from += kLineNumbers, to += kTileNumbers) {
        for (std::int64_t i = 0; i < kLineNumbers; i += 64 / std::int64_t{sizeof(*from)})
          __builtin_prefetch(next + s * kLineNumbers + i, 0, 2);
        _mm512_store_ps(to, load_line<E>(from, a_.depth - (step + s) * kLineNumbers));
      }
    }
  }

  void multiply(std::int64_t count, std::int64_t rows, const float* x, std::int64_t steps, bool begins,
                float* sums) const {
    if (count > kTileRows) {
      rows > kTileRows ? multiply_panel<2, 2>(x, steps, begins, sums) : multiply_panel<2, 1>(x, steps, begins, sums);
    } else {
      rows > kTileRows ? multiply_panel<1, 2>(x, steps, begins, sums) : multiply_panel<1, 1>(x, steps, begins, sums);
    }
  }

  template <int Entries, int Rows>
  void multiply_panel(const float* x, std::int64_t steps, bool begins, float* sums) const {
    constexpr std::int64_t kStride = kPanelRows * std::int64_t{sizeof(float)};
    const auto each_sum = [&](auto&& fn) QTALE_INLINE_LAMBDA {
      unroll<Entries * Rows>([&](auto i) QTALE_INLINE_LAMBDA {
        constexpr int kEntry = i / Rows, kRow = i % Rows;
        fn(i, std::integral_constant<int, kEntry>{}, std::integral_constant<int, kRow>{});
      });
    };
    each_sum([&](auto i, auto e, auto r) QTALE_INLINE_LAMBDA {
      begins ? zero_tile<i>() : load_tile<i>(sums + e * kTileRows * kPanelRows + r * kTileRows, kStride);
    });
    const std::uint16_t* entries = entries_;
    for (std::int64_t s = 0; s < steps; ++s, entries += kTileNumbers, x += x_.tiles * x_.tile_pairs()) {
      unroll<Entries>([&](auto e) QTALE_INLINE_LAMBDA {
        load_tile<kEntryTile + e>(entries + e * steps * kTileNumbers, kTileLine);
      });
      unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA { load_tile<kRowTile + r>(x + r * x_.tile_pairs(), x_.line()); });
      each_sum([&](auto i, auto e, auto r)
                   QTALE_INLINE_LAMBDA { multiply_bf16_tiles<i, kEntryTile + e, kRowTile + r>(); });
    }
    each_sum([&](auto i, auto e, auto r) QTALE_INLINE_LAMBDA {
      store_tile_sums<i>(sums + e * kTileRows * kPanelRows + r * kTileRows, kStride);
    });
  }

  const ProjectArgs& a_;
  const Store sink_;
  TilePanels x_;
  std::uint16_t* entries_;  // of some steps
  float* sums_;             // [panels][kTileEntries][kPanelRows]
};

// Entries times the rows of one panel wait for memory: 16 at a time, one of each of 16 streams, which hardware reads
// ahead as well. With Direct they are multiplied where they lie, else from a ring of tiles.
template <class E, bool Direct>
class FewRowTiles {
 public:
  FewRowTiles(const ProjectArgs& a, std::byte* scratch, const Store& sink)
      : a_(a),
        sink_(sink),
        x_(a.rows, a.depth),
        ring_(reinterpret_cast<std::uint16_t*>(scratch)),
        sums_(reinterpret_cast<float*>(scratch + kRing * kTileBytes)) {}

  // Whole groups of [begin, end); returns where they end.
  std::int64_t run(std::int64_t begin, std::int64_t end) const {
    product_shapes(x_).use();
    const std::int64_t apart = (end - begin) / kTileRows;
    for (std::int64_t i = 0; i < apart; ++i) {
      x_.tiles == 2 ? multiply<2>(begin + i, apart) : multiply<1>(begin + i, apart);
      for (std::int64_t e = 0; e < kTileRows; ++e)
        for (std::int64_t r = 0; r < a_.rows; ++r) sink_.one(r, begin + i + e * apart, sums_[e * kPanelRows + r]);
    }
    release_tiles();
    return begin + apart * kTileRows;
  }

 private:
  static constexpr std::int64_t kRing = 4;  // tiles: one is read long after it was written
  static_assert(kRing * kTileBytes + kTileRows * kPanelRows * 4 <= ManyRowTiles<E>::kEntryBytes);

  // Steps of 16 entries that lie `apart`.
  struct Entries {
    const typename E::T* at;
    std::int64_t apart;  // numbers
  };

  template <int Rows>
  void multiply(std::int64_t entry, std::int64_t apart) const {
    unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA { zero_tile<r>(); });
    const auto* x = reinterpret_cast<const float*>(a_.packed);
    const Entries entries{entry_at<E>(a_, entry, 0), apart * a_.matrix.stride};
    if constexpr (!Direct)
      for (std::int64_t s = 0; s < kRing - 1; ++s) copy(entries, s);
    for (std::int64_t s = 0; s < x_.steps; ++s) {
      if constexpr (Direct) {
        load_tile<kEntryTile>(entries.at + s * kLineNumbers, 2 * entries.apart);
        ask(entries, s);
      } else {
        copy(entries, s + kRing - 1);
        load_tile<kEntryTile>(ring_ + s % kRing * kTileNumbers, kTileLine);
      }
      unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
        load_tile<kRowTile + r>(x, x_.line());
        multiply_bf16_tiles<r, kEntryTile, kRowTile + r>();
        x += x_.tile_pairs();
      });
    }
    unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
      store_tile_sums<r>(sums_ + r * kTileRows, kPanelRows * std::int64_t{sizeof(float)});
    });
  }

  void copy(const Entries& entries, std::int64_t step) const {
    if (step >= x_.steps) return;
    const typename E::T* from = entries.at + step * kLineNumbers;
    std::uint16_t* const to = ring_ + step % kRing * kTileNumbers;
    const std::int64_t depth = a_.depth - step * kLineNumbers;
    ask(entries, step);
    for (int e = 0; e < kTileRows; ++e, from += entries.apart)
      _mm512_store_ps(to + e * kLineNumbers, load_line<E>(from, depth));
  }

  static void ask(const Entries& entries, std::int64_t step) {
    const auto* ahead = reinterpret_cast<const char*>(entries.at + step * kLineNumbers) + kTileAhead;
    const std::int64_t apart = entries.apart * std::int64_t{sizeof(*entries.at)};
    for (int e = 0; e < kTileRows; ++e, ahead += apart)
      for (std::int64_t i = 0; i < kLineNumbers * std::int64_t{sizeof(*entries.at)}; i += 64)
        __builtin_prefetch(ahead + i);
  }

  const ProjectArgs& a_;
  const Store sink_;
  TilePanels x_;
  std::uint16_t* ring_;
  float* sums_;  // [16][kPanelRows]
};

template <class E>
void store_entries(const ProjectArgs& a, std::int64_t begin, std::int64_t end, std::byte* scratch, const Store& sink) {
  constexpr bool kBf16 = std::is_same_v<E, Bf16>;
  if (a.rows <= kPanelRows) {
    const bool direct = kBf16 && a.depth % kLineNumbers == 0;
    begin = direct ? FewRowTiles<E, kBf16>(a, scratch, sink).run(begin, end)
                   : FewRowTiles<E, false>(a, scratch, sink).run(begin, end);
  }
  if (begin < end) ManyRowTiles<E>(a, scratch, sink).run(begin, end);
}
inline void store_tiles(const ProjectArgs& a, std::int64_t begin, std::int64_t end, std::byte* scratch,
                        const ProjectOut& out) {
  with_type(a.matrix.dtype,
            [&](auto element) { store_entries<decltype(element)>(a, begin, end, scratch, Store{out}); });
}

constexpr ProjectKernel amx_kernel = {
    amx_packed_bytes, pack_row_tiles, ManyRowTiles<Bf16>::scratch_bytes, nullptr, store_tiles, kPanelRows,
    kTileEntries,     kTileEntries,
};

}  // namespace
}  // namespace qtale::cpu::projection

// x times a matrix on AMX, both rounded to bf16. A product is summed along the depth in tiles, for few rows as for
// many, where x and the matrix change places: its bits stay.
#pragma once

#include "cpu/project_amx_many.inl"

namespace qtale::cpu::projection {
namespace {

constexpr std::int64_t kTileAhead = 512;  // bytes of each stream that are asked for in advance

inline TileShapes column_shapes(const ColumnTiles& x) {
  TileShapes shapes;
  if (x.lanes < kTileRows)
    for (const int tile : {0, 1, 2, 3, kSecondTile, kSecondTile + 1}) shapes.set(tile, kTileRows, 4 * x.lanes);
  return shapes;
}

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
    column_shapes(x_).use();
    const std::int64_t apart = (end - begin) / kTileRows;
    for (std::int64_t i = 0; i < apart; ++i) run_group(begin + i, apart, kTileRows);
    release_tiles();
    return begin + apart * kTileRows;
  }

  // Up to 15 entries side by side.
  void run_rest(std::int64_t begin, std::int64_t end) const {
    static_assert(!Direct);
    column_shapes(x_).use();
    run_group(begin, 1, end - begin);
    release_tiles();
  }

 private:
  static constexpr std::int64_t kRing = 4;  // tiles: one is read long after it was written
  static_assert(kRing * kTileBytes + kTileRows * kPanelRows * 4 <= ManyRowTiles<E>::kEntryBytes);

  // Steps of up to 16 entries that lie `apart`.
  struct Entries {
    const typename E::T* at;
    std::int64_t apart;  // numbers
    std::int64_t count;
  };

  void run_group(std::int64_t entry, std::int64_t apart, std::int64_t count) const {
    const Entries entries{entry_at<E>(a_.matrix, entry, 0), apart * a_.matrix.stride, count};
    x_.tiles == 2 ? multiply<2>(entries) : multiply<1>(entries);
    for (std::int64_t e = 0; e < count; ++e)
      for (std::int64_t r = 0; r < a_.rows; ++r) sink_.one(r, entry + e * apart, sums_[e * kPanelRows + r]);
  }

  template <int Rows>
  void multiply(const Entries& entries) const {
    unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA { zero_tile<r>(); });
    const auto* x = reinterpret_cast<const float*>(a_.packed);
    if constexpr (!Direct)
      for (std::int64_t s = 0; s < kRing - 1; ++s) copy(entries, s);
    for (std::int64_t s = 0; s < x_.steps; ++s) {
      if constexpr (Direct) {
        load_tile<kFirstTile>(entries.at + s * kLineNumbers, 2 * entries.apart);
        ask(entries, s);
      } else {
        copy(entries, s + kRing - 1);
        load_tile<kFirstTile>(ring_ + s % kRing * kTileNumbers, kTileLine);
      }
      unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
        load_tile<kSecondTile + r>(x, x_.line());
        multiply_bf16_tiles<r, kFirstTile, kSecondTile + r>();
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
    for (std::int64_t e = 0; e < entries.count; ++e, from += entries.apart)
      _mm512_store_ps(to + e * kLineNumbers, load_line<E>(from, depth));
  }

  static void ask(const Entries& entries, std::int64_t step) {
    const auto* ahead = reinterpret_cast<const char*>(entries.at + step * kLineNumbers) + kTileAhead;
    const std::int64_t apart = entries.apart * std::int64_t{sizeof(*entries.at)};
    for (std::int64_t e = 0; e < entries.count; ++e, ahead += apart)
      for (std::int64_t i = 0; i < kLineNumbers * std::int64_t{sizeof(*entries.at)}; i += 64)
        __builtin_prefetch(ahead + i);
  }

  const ProjectArgs& a_;
  const Store sink_;
  ColumnTiles x_;
  std::uint16_t* ring_;
  float* sums_;  // [16][kPanelRows]
};

template <class E>
void store_few(const ProjectArgs& a, std::int64_t begin, std::int64_t end, std::byte* scratch, const Store& sink) {
  constexpr bool kBf16 = std::is_same_v<E, Bf16>;
  const FewRowTiles<E, false> copied(a, scratch, sink);
  const bool direct = kBf16 && a.depth % kLineNumbers == 0;
  begin = direct ? FewRowTiles<E, kBf16>(a, scratch, sink).run(begin, end) : copied.run(begin, end);
  if (begin < end) copied.run_rest(begin, end);
}

inline void store_tiles(const ProjectArgs& a, std::int64_t begin, std::int64_t end, std::byte* scratch,
                        const ProjectOut& out) {
  with_type(a.matrix.dtype, [&](auto element) {
    using E = decltype(element);
    if (are_columns(a.rows)) return store_few<E>(a, begin, end, scratch, Store{out});  // never gated
    ManyRowTiles<E>(a, scratch, out).run(begin, end);
  });
}

constexpr ProjectKernel amx_kernel = {
    amx_packed_bytes, pack_tiles, ManyRowTiles<Bf16>::scratch_bytes, nullptr, store_tiles, kPanelRows, kTileEntries,
    kTileEntries,     true,
};

}  // namespace
}  // namespace qtale::cpu::projection

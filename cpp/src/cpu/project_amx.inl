// x times a matrix on AMX, both rounded to bf16. A product is summed along the depth in tiles, for few rows as for
// many, where x and the matrix change places: its bits stay.
#pragma once

#include "cpu/project_amx_many.inl"

namespace qtale::cpu::projection {
namespace {

constexpr std::int64_t kTileAhead = 512;    // bytes of each stream that are asked for in advance
constexpr std::int64_t kTiledAhead = 4096;  // the same of streams of tiles

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

// The same of a matrix that lies as tiles, of which several are read at once, a stream each: sums go to y from theirs.
template <int Halves>
class FewRowsOfTiles {
 public:
  FewRowsOfTiles(const ProjectArgs& a, std::byte* scratch, const ProjectOut& out)
      : a_(a), out_(out), steps_(a.depth / kLineNumbers), sums_(reinterpret_cast<float*>(scratch)) {}

  void run(std::int64_t begin, std::int64_t end) const {
    const std::int64_t last = a_.rows - (Halves - 1) * kTileRows;
    TileShapes shapes;
    for (int tile = (Halves - 1) * kStreams; tile < Halves * kStreams; ++tile) shapes.set(tile, last, kTileLine);
    shapes.set(kFirstTile + Halves - 1, last, kTileLine);
    shapes.use();
    constexpr std::int64_t kEntries = kStreams * kTileRows;
    for (; begin + kEntries <= end; begin += kEntries) multiply<kStreams>(begin);
    for (; begin < end; begin += kTileRows) multiply<1>(begin);
    release_tiles();
  }

 private:
  static constexpr int kStreams = 4 / Halves;

  template <int Streams>
  void multiply(std::int64_t entry) const {
    const auto* x = reinterpret_cast<const std::uint16_t*>(a_.packed);
    const std::uint16_t* tiles = entry_at<Bf16>(a_.matrix, entry, 0);
    const std::int64_t apart = kTileRows * a_.depth;
    for_sums<Streams>([&](auto half, auto stream) QTALE_INLINE_LAMBDA { zero_tile<half * kStreams + stream>(); });
    for (std::int64_t s = 0; s < steps_; ++s, x += 2 * kTileNumbers, tiles += kTileNumbers) {
      unroll<Halves>([&](auto h) QTALE_INLINE_LAMBDA { load_tile<kFirstTile + h>(x + h * kTileNumbers, kTileLine); });
      unroll<Streams>([&](auto stream) QTALE_INLINE_LAMBDA {
        constexpr int kTile = kSecondTile + stream % 2;
        load_tile<kTile>(tiles + stream * apart, kTileLine);
        unroll<Halves>([&](auto half) QTALE_INLINE_LAMBDA {
          multiply_bf16_tiles<half * kStreams + stream, kFirstTile + half, kTile>();
        });
        ask(tiles + stream * apart);
      });
    }
    out_.bias == nullptr ? store<Streams>(out_.y + entry, out_.stride) : add_bias<Streams>(entry);
  }

  template <int Streams, class Fn>
  QTALE_INLINE static void for_sums(Fn&& fn) {
    unroll<Halves>([&](auto half) QTALE_INLINE_LAMBDA {
      unroll<Streams>([&](auto stream) QTALE_INLINE_LAMBDA { fn(half, stream); });
    });
  }

  template <int Streams>
  void store(float* to, std::int64_t stride) const {
    for_sums<Streams>([&](auto half, auto stream) QTALE_INLINE_LAMBDA {
      store_tile_sums<half * kStreams + stream>(to + half * kTileRows * stride + stream * kTileRows,
                                                stride * std::int64_t{sizeof(float)});
    });
  }

  template <int Streams>
  void add_bias(std::int64_t entry) const {
    constexpr std::int64_t kCount = Streams * kTileRows;
    store<Streams>(sums_, kCount);
    for (std::int64_t r = 0; r < a_.rows; ++r)
      for (std::int64_t e = 0; e < kCount; e += kWidth)
        store_f32(out_.y + r * out_.stride + entry + e,
                  add(load_f32(sums_ + r * kCount + e), load_f32(out_.bias + entry + e)));
  }

  static void ask(const std::uint16_t* tile) {
    const auto* ahead = reinterpret_cast<const char*>(tile) + kTiledAhead;
    for (std::int64_t i = 0; i < kTileBytes; i += 64) __builtin_prefetch(ahead + i);
  }

  const ProjectArgs& a_;
  const ProjectOut& out_;
  std::int64_t steps_;
  float* sums_;  // [rows][entries]
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
  if (a.tiled && a.rows <= kTileRows) return FewRowsOfTiles<1>(a, scratch, out).run(begin, end);
  if (a.tiled && a.rows <= kPanelRows) return FewRowsOfTiles<2>(a, scratch, out).run(begin, end);
  with_type(a.matrix.dtype, [&](auto element) {
    using E = decltype(element);
    if (are_columns(a)) return store_few<E>(a, begin, end, scratch, Store{out});  // never gated or added
    ManyRowTiles<E>(a, scratch, out).run(begin, end);
  });
}

constexpr ProjectKernel amx_kernel = {
    amx_packed_bytes, pack_tiles,   ManyRowTiles<Bf16>::scratch_bytes,
    nullptr,          store_tiles,  kPanelRows,
    kTileEntries,     kTileEntries, true,
    amx_round,
};

}  // namespace
}  // namespace qtale::cpu::projection

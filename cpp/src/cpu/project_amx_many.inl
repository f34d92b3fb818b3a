// Rows of x times entries in tiles of both, for more rows than one panel has. Entries become columns of tiles, 32 of
// one block of the depth at a time, where they do not lie so; a block of sums is finished in y where that takes whole
// tiles. Of a gated product these are 16 entries of each matrix, whose sums meet in L1.
#pragma once

#include <algorithm>
#include <array>

#include "cpu/exp.inl"
#include "cpu/project_amx_pack.inl"

namespace qtale::cpu::projection {
namespace {

constexpr std::int64_t kTileEntries = 2 * kTileRows;      // that are multiplied at once
constexpr int kFirstTile = 4, kSecondTile = 6;            // the first of two of each factor; those before hold sums
constexpr std::int64_t kSumTile = kTileRows * kTileRows;  // float32
constexpr std::int64_t kPanelSums = 4 * kSumTile;         // of 32 rows and entries: [2 of rows][2 of entries]
constexpr std::int64_t kCachedBytes = 768 << 10;          // of x that stay in L2 for one group of entries after another
constexpr std::int64_t kMostGroups = 8;                   // for which a block of x is read once where x is larger

template <class E>
class ManyRowTiles {
 public:
  ManyRowTiles(const ProjectArgs& a, std::byte* scratch, const ProjectOut& out)
      : a_(a),
        out_(out),
        x_(a.rows, a.depth),
        group_(a.up.data == nullptr ? kTileEntries : kTileRows),
        step_(a.tiled ? kTileNumbers : kLineNumbers),
        entries_(reinterpret_cast<std::uint16_t*>(scratch)),
        lines_(entries_ + 2 * RowTiles::kWholeSteps * kTileNumbers),
        sums_(reinterpret_cast<float*>(scratch + kEntryBytes)) {}

  static constexpr std::size_t kEntryBytes = (2 * RowTiles::kWholeSteps + 1) * kTileBytes;
  static std::size_t scratch_bytes(std::int64_t rows) {
    return kEntryBytes +
           static_cast<std::size_t>(ceil_div(rows, kPanelRows) * kPanelSums * kMostGroups) * sizeof(float);
  }

  void run(std::int64_t begin, std::int64_t end) const {
    TileShapes().use();
    const std::int64_t at_once = group_ * (x_.bytes() > kCachedBytes ? kMostGroups : 1);
    for (; begin < end; begin += at_once) run_groups(begin, min64(begin + at_once, end), end);
    release_tiles();
  }

 private:
  // A group of entries and a block of the depth.
  struct Place {
    std::int64_t entry, count, step;
  };
  // Both tiles of a group's entries, and how many numbers on those of the next step are.
  struct Columns {
    const std::uint16_t *first, *second;
    std::int64_t step;
  };
  // Sums of a panel that are not in y yet, from `row` on.
  struct Unfinished {
    const float* sums = nullptr;
    std::int64_t entry = 0, count = 0;  // the first of its entries, and how many
    std::int64_t row = 0, rows = 0;     // within the panel
    std::int64_t first = 0;             // row of x, of the panel
  };
  // What a product asks for in advance, of the next one: lines of both its tiles, and y, which it writes.
  struct Ahead {
    std::array<const typename E::T*, 2> lines;
    std::int64_t count;
    const std::byte* y;
  };

  bool gated() const { return a_.up.data != nullptr; }
  const RowsIn& matrix_of(std::int64_t tile) const { return gated() && tile == 1 ? a_.up : a_.matrix; }
  // The first of the entries of one of a group's two tiles.
  const typename E::T* entries_of(std::int64_t tile, std::int64_t entry, std::int64_t step) const {
    const typename E::T* first = entry_at<E>(matrix_of(tile), entry + (gated() ? 0 : tile * kTileRows), 0);
    return first + step * step_;
  }
  std::int64_t line_of(std::int64_t tile) const { return a_.tiled ? kLineNumbers : matrix_of(tile).stride; }

  void run_groups(std::int64_t begin, std::int64_t end, std::int64_t last) const {
    for (std::int64_t step = 0; step < x_.steps; step += x_.block)
      for (std::int64_t entry = begin; entry < end; entry += group_) {
        const bool ends = step + x_.block >= x_.steps;
        Place next{entry + group_, group_, step};
        if (next.entry >= end) next = ends ? Place{end, group_, 0} : Place{begin, group_, step + x_.block};
        if (next.entry + group_ > last) next.count = 0;
        float* const sums = sums_ + (entry - begin) / group_ * (x_.rows / kPanelRows) * kPanelSums;
        run_block({entry, min64(group_, end - entry), step}, next, sums);
      }
  }

  void run_block(const Place& place, const Place& next, float* sums) const {
    const std::int64_t steps = x_.steps_at(place.step);
    const bool ends = place.step + steps >= x_.steps;
    const Columns columns = a_.tiled ? columns_at(place) : make_columns(place, steps);
    Unfinished last;
    for (std::int64_t row = 0; row < x_.rows; row += kPanelRows, sums += kPanelSums) {
      const bool all_rows = row + kPanelRows <= a_.rows;
      const auto* x = reinterpret_cast<const std::uint16_t*>(a_.packed) + x_.offset(place.step, row);
      const std::int64_t at = row * out_.stride + place.entry;
      begin_sums(place.step == 0, sums);
      const Ahead ahead = ahead_of(next, row, ends && row + 2 * kPanelRows <= a_.rows ? at : -1);
      x_.is_whole() ? multiply<true>(x, columns, steps, ahead, last) : multiply<false>(x, columns, steps, ahead, last);
      finish(last);
      if (ends && all_rows && goes_to_y() && place.count == group_) {
        store_sums(out_.y + at, out_.stride, kTileRows, kTileRows * out_.stride);
        continue;
      }
      store_sums(sums, kTileRows, kSumTile, 2 * kSumTile);
      if (ends) last = {sums, place.entry, place.count, 0, min64(kPanelRows, a_.rows - row), row};
    }
    finish(last);
  }

  // Each panel of rows asks for some of the next lines, and for the rows of y that come after its own.
  Ahead ahead_of(const Place& next, std::int64_t row, std::int64_t y) const {
    const std::int64_t count = ceil_div(kTileRows, x_.rows / kPanelRows), first = row / kPanelRows * count;
    Ahead ahead{{}, 0, y < 0 ? nullptr : y_bytes() + (y + kPanelRows * out_.stride) * y_size()};
    if (next.count == 0 || first >= kTileRows) return ahead;
    for (std::int64_t tile = 0; tile < 2; ++tile)
      ahead.lines[static_cast<std::size_t>(tile)] = entries_of(tile, next.entry, next.step) + first * line_of(tile);
    ahead.count = min64(count, kTileRows - first);
    return ahead;
  }

  // Where they lie; of a group without a second tile the first one twice.
  Columns columns_at(const Place& place) const {
    if constexpr (std::is_same_v<E, Bf16>) {
      const bool both = gated() || place.count > kTileRows;
      return {entries_of(0, place.entry, place.step), entries_of(both ? 1 : 0, place.entry, place.step), step_};
    }
    return {};  // only numbers of bf16 lie so
  }

  // 32 entries of some steps to [steps][2][16 pairs][16]; those that are not there are zero.
  Columns make_columns(const Place& place, std::int64_t steps) const {
    std::uint16_t* to = entries_;
    for (std::int64_t s = place.step; s < place.step + steps; ++s)
      for (std::int64_t tile = 0; tile < 2; ++tile, to += kTileNumbers) {
        const typename E::T* from = entries_of(tile, place.entry, s);
        const std::int64_t stride = matrix_of(tile).stride, depth = a_.depth - s * kLineNumbers;
        const std::int64_t lines =
            std::clamp<std::int64_t>(place.count - (gated() ? 0 : tile * kTileRows), 0, kTileRows);
        const bool direct = std::is_same_v<E, Bf16> && lines == kTileRows && depth >= kLineNumbers;
        if (!direct) copy_lines(from, stride, lines, depth);
        direct ? make_tile(from, stride * std::int64_t{sizeof(*from)}, to) : make_tile(lines_, kTileLine, to);
      }
    return {entries_, entries_ + kTileNumbers, 2 * kTileNumbers};
  }

  void copy_lines(const typename E::T* from, std::int64_t stride, std::int64_t lines, std::int64_t depth) const {
    for (std::int64_t i = 0; i < kTileRows; ++i, from += stride)
      _mm512_store_ps(lines_ + i * kLineNumbers, i < lines ? load_line<E>(from, depth) : set1(0.0f));
  }

  static void begin_sums(bool zero, const float* sums) {
    unroll<4>([&](auto i)
                  QTALE_INLINE_LAMBDA { zero ? zero_tile<i>() : load_tile<i>(sums + i * kSumTile, kTileLine); });
  }

  // Vectors finish a panel's sums while tiles are busy with the next one.
  template <bool Pass>
  QTALE_INLINE void multiply(const std::uint16_t* x, Columns columns, std::int64_t steps, const Ahead& ahead,
                             Unfinished& last) const {
    const auto beside = [&]() QTALE_INLINE_LAMBDA {
      if (last.row < last.rows) finish_one(last);
    };
    const std::int64_t lines[] = {line_of(0), line_of(1)};
    const std::int64_t rows_asked = ahead.y == nullptr ? 0 : ceil_div(kPanelRows, steps);
    const std::int64_t row_bytes = out_.stride * y_size();
    const std::byte* y = ahead.y;
    for (std::int64_t s = 0; s < steps; ++s, x += 2 * kTileNumbers) {
      load_row_tile<Pass, kFirstTile>(x);
      load_tile<kSecondTile>(columns.first, kTileLine);
      multiply_bf16_tiles<0, kFirstTile, kSecondTile>();
      beside();
      load_tile<kSecondTile + 1>(columns.second, kTileLine);
      multiply_bf16_tiles<1, kFirstTile, kSecondTile + 1>();
      beside();
      for (std::int64_t i = 0; i < ahead.count; ++i) {
        ask(ahead.lines[0] + i * lines[0] + s * step_);
        ask(ahead.lines[1] + i * lines[1] + s * step_);
      }
      load_row_tile<Pass, kFirstTile + 1>(x + kTileNumbers);
      multiply_bf16_tiles<2, kFirstTile + 1, kSecondTile>();
      beside();
      for (std::int64_t i = 0; i < rows_asked && y < ahead.y + kPanelRows * row_bytes; ++i, y += row_bytes) {
        __builtin_prefetch(y, 1);
        if (!gated()) __builtin_prefetch(y + kTileLine, 1);
      }
      multiply_bf16_tiles<3, kFirstTile + 1, kSecondTile + 1>();
      beside();
      columns.first += columns.step;
      columns.second += columns.step;
    }
  }

  template <bool Pass, int Tile>
  QTALE_INLINE static void load_row_tile(const std::uint16_t* from) {
    Pass ? pass_tile<Tile>(from, kTileLine) : load_tile<Tile>(from, kTileLine);
  }

  QTALE_INLINE static void ask(const typename E::T* line) {
    for (std::int64_t i = 0; i < kLineNumbers; i += 64 / std::int64_t{sizeof(*line)})
      __builtin_prefetch(line + i, 0, 2);
  }

  // Tiles of sums whose rows lie `stride` apart, those of other entries and rows `across` and `down`.
  QTALE_INLINE static void store_sums(float* to, std::int64_t stride, std::int64_t across, std::int64_t down) {
    const std::int64_t bytes = stride * std::int64_t{sizeof(float)};
    unroll<4>([&](auto i) QTALE_INLINE_LAMBDA { store_tile_sums<i>(to + i % 2 * across + i / 2 * down, bytes); });
  }

  // Whether sums go to y from their tiles; the others are finished later.
  bool goes_to_y() const { return !gated() && !out_.adds && out_.bias == nullptr; }

  void finish(Unfinished& u) const {
    while (u.row < u.rows) finish_one(u);
  }
  QTALE_INLINE void finish_one(Unfinished& u) const { gated() ? finish_gated(u) : finish_row(u); }

  std::int64_t place_in_y(const Unfinished& u) const { return (u.first + u.row) * out_.stride + u.entry; }
  static const float* sums_of(const Unfinished& u) {
    return u.sums + u.row / kTileRows * 2 * kSumTile + u.row % kTileRows * kTileRows;
  }

  QTALE_INLINE void finish_gated(Unfinished& u) const {
    const float* from = sums_of(u);
    store_gated(mul(silu(load_f32(from)), load_f32(from + kSumTile)), first_lanes(u.count), place_in_y(u));
    ++u.row;
  }

  void finish_row(Unfinished& u) const {
    const float* from = sums_of(u);
    for (std::int64_t e = 0; e < u.count; e += kTileRows, from += kSumTile) {
      const __mmask16 there = first_lanes(u.count - e);
      float* const y = out_.y + place_in_y(u) + e;
      VecF sum = load_f32(from);
      if (out_.bias != nullptr) sum = add(sum, _mm512_maskz_loadu_ps(there, out_.bias + u.entry + e));
      if (out_.adds) sum = add(_mm512_maskz_loadu_ps(there, y), sum);
      _mm512_mask_storeu_ps(y, there, sum);
    }
    ++u.row;
  }

  QTALE_INLINE void store_gated(VecF product, __mmask16 there, std::int64_t at) const {
    if (out_.rounded == nullptr) return _mm512_mask_storeu_ps(out_.y + at, there, product);
    const auto rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(product));
    _mm256_mask_storeu_epi16(out_.rounded + at, there, rounded);
  }
  std::int64_t y_size() const { return out_.rounded == nullptr ? 4 : 2; }
  const std::byte* y_bytes() const {
    return out_.rounded == nullptr ? reinterpret_cast<const std::byte*>(out_.y)
                                   : reinterpret_cast<const std::byte*>(out_.rounded);
  }

  static __mmask16 first_lanes(std::int64_t count) {
    return static_cast<__mmask16>(0xffffu >> (kTileRows - min64(kTileRows, count)));
  }

  const ProjectArgs& a_;
  const ProjectOut& out_;
  RowTiles x_;
  std::int64_t group_;      // entries that are multiplied at once, of each matrix
  std::int64_t step_;       // numbers from a step of the matrix to the next
  std::uint16_t* entries_;  // columns
  std::uint16_t* lines_;    // 16 entries of one step
  float* sums_;             // [groups][panels][4 tiles]
};

}  // namespace
}  // namespace qtale::cpu::projection

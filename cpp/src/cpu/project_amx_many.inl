// Rows of x times entries in tiles of both, for more rows than one panel has. Entries become columns of tiles, 32 of
// one block of the depth at a time; a block of sums is finished in y where that takes whole tiles. Of a gated product
// these are 16 entries of each matrix, whose sums meet in L1.
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

// Four columns of 32-bit pairs of 16 lines, side by side.
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
  _mm512_store_si512(to, _mm512_unpacklo_epi64(low01, low23));
  _mm512_store_si512(to + kLineNumbers, _mm512_unpackhi_epi64(low01, low23));
  _mm512_store_si512(to + 2 * kLineNumbers, _mm512_unpacklo_epi64(high01, high23));
  _mm512_store_si512(to + 3 * kLineNumbers, _mm512_unpackhi_epi64(high01, high23));
}

template <class E>
class ManyRowTiles {
 public:
  ManyRowTiles(const ProjectArgs& a, std::byte* scratch, const ProjectOut& out)
      : a_(a),
        out_(out),
        x_(a.rows, a.depth),
        group_(a.up.data == nullptr ? kTileEntries : kTileRows),
        entries_(reinterpret_cast<std::uint16_t*>(scratch)),
        lines_(entries_ + 2 * RowTiles::kBlockSteps * kTileNumbers),
        sums_(reinterpret_cast<float*>(scratch + kEntryBytes)) {}

  static constexpr std::size_t kEntryBytes = (2 * RowTiles::kBlockSteps + 1) * kTileBytes;
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
  // What a product asks for in advance, of the next one: lines of both its tiles, and y, which it writes.
  struct Ahead {
    std::array<const typename E::T*, 2> lines;
    std::int64_t count;
    float* y;
  };

  bool gated() const { return a_.up.data != nullptr; }
  const RowsIn& matrix_of(std::int64_t tile) const { return gated() && tile == 1 ? a_.up : a_.matrix; }
  // The first of the entries of one of a group's two tiles.
  const typename E::T* entries_of(std::int64_t tile, std::int64_t entry, std::int64_t step) const {
    return entry_at<E>(matrix_of(tile), entry + (gated() ? 0 : tile * kTileRows), step);
  }

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
    make_columns(place, steps);
    for (std::int64_t row = 0; row < x_.rows; row += kPanelRows, sums += kPanelSums) {
      const bool all_rows = row + kPanelRows <= a_.rows;
      const auto* x = reinterpret_cast<const std::uint16_t*>(a_.packed) + x_.offset(place.step, row);
      float* const y = out_.y + row * out_.stride + place.entry;
      begin_sums(place.step == 0, sums);
      multiply(x, steps, ahead_of(next, row, ends && row + 2 * kPanelRows <= a_.rows ? y : nullptr));
      if (ends && all_rows && !gated() && out_.bias == nullptr && place.count == group_) {
        store_sums(y, out_.stride, kTileRows, kTileRows * out_.stride);
        continue;
      }
      store_sums(sums, kTileRows, kSumTile, 2 * kSumTile);
      if (ends) finish(sums, place, row, y);
    }
  }

  // Each panel of rows asks for some of the next lines, and for the rows of y that come after its own.
  Ahead ahead_of(const Place& next, std::int64_t row, float* y) const {
    const std::int64_t count = ceil_div(kTileRows, x_.rows / kPanelRows), first = row / kPanelRows * count;
    Ahead ahead{{}, 0, y == nullptr ? nullptr : y + kPanelRows * out_.stride};
    if (next.count == 0 || first >= kTileRows) return ahead;
    for (std::int64_t tile = 0; tile < 2; ++tile)
      ahead.lines[static_cast<std::size_t>(tile)] =
          entries_of(tile, next.entry, next.step) + first * matrix_of(tile).stride;
    ahead.count = min64(count, kTileRows - first);
    return ahead;
  }

  // 32 entries of some steps to [steps][2][16 pairs][16]; those that are not there are zero.
  void make_columns(const Place& place, std::int64_t steps) const {
    std::uint16_t* to = entries_;
    for (std::int64_t s = place.step; s < place.step + steps; ++s)
      for (std::int64_t tile = 0; tile < 2; ++tile, to += kTileNumbers) {
        const typename E::T* from = entries_of(tile, place.entry, s);
        const std::int64_t stride = matrix_of(tile).stride, depth = a_.depth - s * kLineNumbers;
        const std::int64_t lines =
            std::clamp<std::int64_t>(place.count - (gated() ? 0 : tile * kTileRows), 0, kTileRows);
        const bool direct = std::is_same_v<E, Bf16> && lines == kTileRows && depth >= kLineNumbers;
        if (!direct) copy_lines(from, stride, lines, depth);
        const auto* at = direct ? reinterpret_cast<const std::byte*>(from) : reinterpret_cast<const std::byte*>(lines_);
        const std::int64_t apart = direct ? stride * std::int64_t{sizeof(*from)} : kTileLine;
        for (std::int64_t c = 0; c < 4; ++c) transpose_pairs(at + 16 * c, apart, to + 4 * c * kLineNumbers);
      }
  }

  void copy_lines(const typename E::T* from, std::int64_t stride, std::int64_t lines, std::int64_t depth) const {
    for (std::int64_t i = 0; i < kTileRows; ++i, from += stride)
      _mm512_store_ps(lines_ + i * kLineNumbers, i < lines ? load_line<E>(from, depth) : set1(0.0f));
  }

  static void begin_sums(bool zero, const float* sums) {
    unroll<4>([&](auto i)
                  QTALE_INLINE_LAMBDA { zero ? zero_tile<i>() : load_tile<i>(sums + i * kSumTile, kTileLine); });
  }

  QTALE_INLINE void multiply(const std::uint16_t* x, std::int64_t steps, const Ahead& ahead) const {
    const std::uint16_t* entries = entries_;
    const std::int64_t rows_asked = ahead.y == nullptr ? 0 : ceil_div(kPanelRows, steps);
    float* y = ahead.y;
    for (std::int64_t s = 0; s < steps; ++s, x += 2 * kTileNumbers, entries += 2 * kTileNumbers) {
      load_tile<kFirstTile>(x, kTileLine);
      load_tile<kSecondTile>(entries, kTileLine);
      multiply_bf16_tiles<0, kFirstTile, kSecondTile>();
      load_tile<kSecondTile + 1>(entries + kTileNumbers, kTileLine);
      multiply_bf16_tiles<1, kFirstTile, kSecondTile + 1>();
      for (std::int64_t i = 0; i < ahead.count; ++i) {
        ask(ahead.lines[0] + i * a_.matrix.stride + s * kLineNumbers);
        ask(ahead.lines[1] + i * matrix_of(1).stride + s * kLineNumbers);
      }
      load_tile<kFirstTile + 1>(x + kTileNumbers, kTileLine);
      multiply_bf16_tiles<2, kFirstTile + 1, kSecondTile>();
      for (std::int64_t i = 0; i < rows_asked && y < ahead.y + kPanelRows * out_.stride; ++i, y += out_.stride) {
        __builtin_prefetch(y, 1);
        if (!gated()) __builtin_prefetch(y + kTileRows, 1);
      }
      multiply_bf16_tiles<3, kFirstTile + 1, kSecondTile + 1>();
    }
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

  // Sums that do not go to y from their tiles.
  void finish(const float* sums, const Place& place, std::int64_t row, float* y) const {
    const std::int64_t rows = min64(kPanelRows, a_.rows - row);
    for (std::int64_t r = 0; r < rows; ++r, y += out_.stride) {
      const float* from = sums + r / kTileRows * 2 * kSumTile + r % kTileRows * kTileRows;
      if (gated()) {
        const VecF gate = load_f32(from), up = load_f32(from + kSumTile);
        _mm512_mask_storeu_ps(y, first_lanes(place.count), mul(silu(gate), up));
        continue;
      }
      for (std::int64_t e = 0; e < place.count; e += kTileRows, from += kSumTile) {
        const __mmask16 there = first_lanes(place.count - e);
        VecF sum = load_f32(from);
        if (out_.bias != nullptr) sum = add(sum, _mm512_maskz_loadu_ps(there, out_.bias + place.entry + e));
        _mm512_mask_storeu_ps(y + e, there, sum);
      }
    }
  }

  static __mmask16 first_lanes(std::int64_t count) {
    return static_cast<__mmask16>(0xffffu >> (kTileRows - min64(kTileRows, count)));
  }

  const ProjectArgs& a_;
  const ProjectOut& out_;
  RowTiles x_;
  std::int64_t group_;      // entries that are multiplied at once, of each matrix
  std::uint16_t* entries_;  // columns
  std::uint16_t* lines_;    // 16 entries of one step
  float* sums_;             // [groups][panels][4 tiles]
};

}  // namespace
}  // namespace qtale::cpu::projection

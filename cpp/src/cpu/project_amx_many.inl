// Rows of x times entries in tiles of both, for more rows than one panel has. Entries become columns of tiles, 32 of
// one block of the depth at a time; a block of sums is finished in y where that takes whole tiles.
#pragma once

#include <algorithm>

#include "cpu/project_amx_pack.inl"

namespace qtale::cpu::projection {
namespace {

constexpr std::int64_t kTileEntries = 2 * kTileRows;      // that are multiplied at once
constexpr int kFirstTile = 4, kSecondTile = 6;            // the first of two of each factor; those before hold sums
constexpr std::int64_t kSumTile = kTileRows * kTileRows;  // float32
constexpr std::int64_t kPanelSums = 4 * kSumTile;         // of 32 rows and entries: [2 of rows][2 of entries]
constexpr std::int64_t kCachedBytes = 768 << 10;          // of x that stay in L2 for one group of entries after another
constexpr std::int64_t kMostGroups = 8;                   // that share what L2 has of x where it does not

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
    const std::int64_t at_once = kTileEntries * (x_.bytes() > kCachedBytes ? kMostGroups : 1);
    for (; begin < end; begin += at_once) run_groups(begin, min64(begin + at_once, end), end);
    release_tiles();
  }

 private:
  // What a product asks for in advance, of the next one: lines of the matrix, and y, which it writes.
  struct Ahead {
    const typename E::T* lines;
    std::int64_t count;
    float* y;
  };

  void run_groups(std::int64_t begin, std::int64_t end, std::int64_t last) const {
    for (std::int64_t step = 0; step < x_.steps; step += x_.block)
      for (std::int64_t entry = begin; entry < end; entry += kTileEntries) {
        const bool ends = step + x_.block >= x_.steps;
        const std::int64_t following = entry + kTileEntries;
        const typename E::T* next = nullptr;
        if (following + kTileEntries <= (ends ? last : end)) {
          next = entry_at<E>(a_, following, following < end ? step : 0);
        } else if (!ends && begin + kTileEntries <= end) {
          next = entry_at<E>(a_, begin, step + x_.block);
        }
        const std::int64_t group = (entry - begin) / kTileEntries;
        run_block(entry, min64(kTileEntries, end - entry), step, next,
                  sums_ + group * x_.rows / kPanelRows * kPanelSums);
      }
  }

  void run_block(std::int64_t entry, std::int64_t count, std::int64_t step, const typename E::T* next,
                 float* sums) const {
    const std::int64_t steps = x_.steps_at(step), panels = x_.rows / kPanelRows;
    const std::int64_t asked = ceil_div(kTileEntries, panels);
    const bool ends = step + steps >= x_.steps;
    make_columns(entry, count, step, steps);
    for (std::int64_t p = 0; p < panels; ++p, sums += kPanelSums) {
      const std::int64_t row = p * kPanelRows;
      float* const y = out_.y + row * out_.stride + entry;
      const bool whole = out_.bias == nullptr && count == kTileEntries && row + kPanelRows <= a_.rows;
      const bool asks = next != nullptr && (p + 1) * asked <= kTileEntries;
      const Ahead ahead{asks ? next + p * asked * a_.matrix.stride : nullptr, asked,
                        ends && row + 2 * kPanelRows <= a_.rows ? y + kPanelRows * out_.stride : nullptr};
      const auto* x = reinterpret_cast<const std::uint16_t*>(a_.packed) + x_.offset(step, row);
      begin_sums(step == 0, sums);
      multiply(x, steps, ahead);
      if (ends && whole) {
        store_sums(y, out_.stride, kTileRows, kTileRows * out_.stride);
      } else {
        store_sums(sums, kTileRows, kSumTile, 2 * kSumTile);
        if (ends) copy_sums(sums, entry, count, row);
      }
    }
  }

  // 32 entries of some steps to [steps][2][16 pairs][16]; those behind `count` are zero.
  void make_columns(std::int64_t entry, std::int64_t count, std::int64_t step, std::int64_t steps) const {
    std::uint16_t* to = entries_;
    for (std::int64_t s = step; s < step + steps; ++s)
      for (std::int64_t e = 0; e < kTileEntries; e += kTileRows, to += kTileNumbers) {
        const typename E::T* from = entry_at<E>(a_, entry + e, s);
        const std::int64_t lines = std::clamp<std::int64_t>(count - e, 0, kTileRows),
                           depth = a_.depth - s * kLineNumbers;
        const bool direct = std::is_same_v<E, Bf16> && lines == kTileRows && depth >= kLineNumbers;
        if (!direct) copy_lines(from, lines, depth);
        const auto* at = direct ? reinterpret_cast<const std::byte*>(from) : reinterpret_cast<const std::byte*>(lines_);
        const std::int64_t stride = direct ? a_.matrix.stride * std::int64_t{sizeof(*from)} : kTileLine;
        for (std::int64_t c = 0; c < 4; ++c) transpose_pairs(at + 16 * c, stride, to + 4 * c * kLineNumbers);
      }
  }

  void copy_lines(const typename E::T* from, std::int64_t lines, std::int64_t depth) const {
    for (std::int64_t i = 0; i < kTileRows; ++i, from += a_.matrix.stride)
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
    const typename E::T* lines = ahead.lines;
    for (std::int64_t s = 0; s < steps; ++s, x += 2 * kTileNumbers, entries += 2 * kTileNumbers) {
      load_tile<kFirstTile>(x, kTileLine);
      load_tile<kSecondTile>(entries, kTileLine);
      multiply_bf16_tiles<0, kFirstTile, kSecondTile>();
      load_tile<kSecondTile + 1>(entries + kTileNumbers, kTileLine);
      multiply_bf16_tiles<1, kFirstTile, kSecondTile + 1>();
      for (std::int64_t i = 0; lines != nullptr && i < ahead.count; ++i)
        ask(lines + i * a_.matrix.stride + s * kLineNumbers);
      load_tile<kFirstTile + 1>(x + kTileNumbers, kTileLine);
      multiply_bf16_tiles<2, kFirstTile + 1, kSecondTile>();
      for (std::int64_t i = 0; i < rows_asked && y < ahead.y + kPanelRows * out_.stride; ++i, y += out_.stride) {
        __builtin_prefetch(y, 1);
        __builtin_prefetch(y + kTileRows, 1);
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

  void copy_sums(const float* sums, std::int64_t entry, std::int64_t count, std::int64_t row) const {
    for (std::int64_t r = 0; r < min64(kPanelRows, a_.rows - row); ++r)
      for (std::int64_t e = 0; e < count; e += kTileRows) {
        const float* from = sums + (r / kTileRows * 2 + e / kTileRows) * kSumTile + r % kTileRows * kTileRows;
        const auto there = static_cast<__mmask16>(0xffffu >> (kTileRows - min64(kTileRows, count - e)));
        __m512 sum = _mm512_load_ps(from);
        if (out_.bias != nullptr) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(there, out_.bias + entry + e));
        _mm512_mask_storeu_ps(out_.y + (row + r) * out_.stride + entry + e, there, sum);
      }
  }

  const ProjectArgs& a_;
  const ProjectOut& out_;
  RowTiles x_;
  std::uint16_t* entries_;  // columns
  std::uint16_t* lines_;    // 16 entries of one step
  float* sums_;             // [groups][panels] of panels
};

}  // namespace
}  // namespace qtale::cpu::projection

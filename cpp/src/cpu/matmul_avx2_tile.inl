// The micro-kernel of the AVX2 tier: up to seven rows of activation codes times one panel, or fewer rows times several.
// Codes of up to 4 bits stay unsigned: products with signed bytes fit 16 bits, and their sums may wrap, because lanes
// start at minus the code offset times their activations and a flush ends before |sum| > 32767. 8-bit codes are
// multiplied as 16-bit numbers.
#pragma once

#include "cpu/matmul_avx2_flush.inl"

namespace qtale::cpu {
namespace {

template <class C, int T, int S, bool Zeros>
QTALE_INLINE void end_flush(const Tile& t, const Layout& l, const Acts& acts, const Place& at, bool last,
                            __m256i (&acc)[S][T][2]) {
  if (at.in_group == 0 && last) return add_flush<C, T, S, Stage::whole, Zeros>(t, l, acts.places(), at, acc);
  if (last) return add_flush<C, T, S, Stage::end, Zeros>(t, l, acts.places(), at, acc);
  if (at.in_group == 0) return add_flush<C, T, S, Stage::begin, Zeros>(t, l, acts.places(), at, acc);
  add_flush<C, T, S, Stage::middle, Zeros>(t, l, acts.places(), at, acc);
}

template <class C, int T, int S, bool Keep>
QTALE_INLINE void flush(const Tile& t, const Layout& l, const Acts& acts, Place& at, std::int64_t count, bool last) {
  __m256i acc[S][T][2];
  start_lanes(t, at, acc);
  // Unsigned numbers divide by a shift alone.
  multiply_steps<C, T, S, Keep>(t, at, static_cast<std::uint64_t>(count) / C::kInputs, acc);
  if (l.symmetric)
    end_flush<C, T, S, false>(t, l, acts, at, last, acc);
  else
    end_flush<C, T, S, true>(t, l, acts, at, last, acc);
  at.in_group = last ? 0 : at.in_group + count;
  next_flush(at, acts.places(), last);
}

// The flushes of an activation group: one, two that share their scales and are added as integers, or two with scales of
// their own.
enum class GroupOf { flush, halves, blocks };

// Moves on behind a block.
template <bool Keeps>
QTALE_INLINE void next_block(Place& at, std::int64_t params_step, std::int64_t codes_step) {
  at.params += params_step;
  if constexpr (Keeps) at.kept_scales += kRows;
  at.codes += codes_step;
}

// Whole activation groups: nothing is left to decide from flush to flush, which takes a quarter of the time where a
// group has two.
template <class C, int T, int S, bool Keep, bool Zeros, GroupOf Form>
QTALE_INLINE void whole_groups(const Tile& t, const Layout& l, const Acts& acts, Place& at, std::int64_t count) {
  constexpr bool kKeeps = C::kKept || Keep;
  constexpr std::int64_t kSteps = kActGroup / (Form == GroupOf::flush ? 1 : 2) / C::kInputs;
  const std::int64_t places = kKeeps ? kTile : acts.rows, params_step = l.per_channel ? 0 : l.block_offset(1);
  const std::int64_t codes_step = C::kKept || l.per_channel ? 0 : l.param_bytes;
  for (; count > 0; --count) {
    keep_scales<C, S>(t, l, at);
    if constexpr (Form != GroupOf::flush) {
      __m256i acc[S][T][2];
      start_lanes(t, at, acc);
      multiply_steps<C, T, S, Keep>(t, at, kSteps, acc);
      if constexpr (Form == GroupOf::halves)
        begin_joint<C>(t, acc);
      else
        add_flush<C, T, S, Stage::begin, Zeros>(t, l, places, at, acc);
      next_flush(at, places, false);
    }
    if constexpr (Form == GroupOf::blocks) {
      next_block<kKeeps>(at, params_step, codes_step);
      keep_scales<C, S>(t, l, at);
    }
    constexpr Stage kLast = Form == GroupOf::flush    ? Stage::whole
                            : Form == GroupOf::halves ? Stage::end_joint
                                                      : Stage::end;
    __m256i acc[S][T][2];
    start_lanes(t, at, acc);
    multiply_steps<C, T, S, Keep>(t, at, kSteps, acc);
    add_flush<C, T, S, kLast, Zeros>(t, l, places, at, acc);
    next_flush(at, places, true);
    next_block<kKeeps>(at, params_step, codes_step);
  }
}

template <class C, int T, int S, bool Keep, bool Zeros>
QTALE_INLINE void whole_groups(const Tile& t, const Layout& l, const Acts& acts, Place& at, std::int64_t count) {
  if (l.block_k < kActGroup) return whole_groups<C, T, S, Keep, Zeros, GroupOf::blocks>(t, l, acts, at, count);
  if constexpr (C::kHalves)
    if (acts.flush < kActGroup) return whole_groups<C, T, S, Keep, Zeros, GroupOf::halves>(t, l, acts, at, count);
  whole_groups<C, T, S, Keep, Zeros, GroupOf::flush>(t, l, acts, at, count);
}

template <bool Kept>
QTALE_INLINE Place first_place(const Tile& t, const Layout& l, const Acts& acts) {
  const std::int64_t k = t.begin * l.block_k,
                     flush = acts.place(t.tile, t.lane, t.begin * acts.per_block, acts.flushes);
  const std::byte* row = acts.word(t.tile, t.lane, (l.num_bits == 8 ? 2 : 1) * k);
  return {Kept ? t.kept : t.panel + l.block_offset(t.begin),
          t.kept,
          t.ahead,
          t.panel + l.param_offset(t.begin),
          t.kept_scales,
          {row, row + 3 * acts.stride, acts.stride, 3 * acts.stride},
          acts.starts + flush,
          acts.sums + flush,
          acts.scales + acts.place(t.tile, t.lane, k / kActGroup, acts.groups),
          0};
}

template <class C, int T, int S, bool Keep>
__attribute__((noipa)) void tile_int8(const Tile& tile) {
  // Copies, because for the compiler every store of a sum may change what it points to. Nothing takes the address of t:
  // its fields were stored one by one just now, and a copy in memory, made by wider loads, would wait for those stores.
  const Tile t = tile;
  const Layout l = *t.layout;
  const Acts acts = *t.acts;
  Place at = first_place<C::kKept>(t, l, acts);
  const std::int64_t params_step = l.per_channel ? 0 : l.block_offset(1);
  const std::int64_t begin = t.begin * l.block_k, end = min64(t.end * l.block_k, l.k_padded);
  const std::int64_t whole = 2 * l.block_k >= kActGroup ? (end - begin) / kActGroup : 0;
  if (l.symmetric)
    whole_groups<C, T, S, Keep, false>(t, l, acts, at, whole);
  else
    whole_groups<C, T, S, Keep, true>(t, l, acts, at, whole);
  for (std::int64_t b = t.begin + whole * kActGroup / l.block_k; b < t.end; ++b) {
    keep_scales<C, S>(t, l, at);
    std::int64_t left = l.block_size(b);
    for (std::int64_t count; left > 0; left -= count) {
      count = min64(acts.flush, left);
      const bool last = at.in_group + count == kActGroup || (left == count && b + 1 == l.blocks);
      flush<C, T, S, Keep>(t, l, acts, at, count, last);
    }
    at.params += params_step;
    if constexpr (C::kKept || Keep) at.kept_scales += kRows;
    if (!C::kKept && !l.per_channel) at.codes += l.param_bytes;
  }
}

template <int Bits>
TileFn direct_tile(std::int64_t rows, int streams) {
  using C = Codes<Bits>;
  static constexpr TileFn kSingle[kTile + 1] = {tile_int8<C, 1, 1, false>,
                                                tile_int8<C, 2, 1, false>,
                                                tile_int8<C, 3, 1, false>,
                                                tile_int8<C, 4, 1, false>,
                                                tile_int8<C, 5, 1, false>,
                                                tile_int8<C, 6, 1, false>,
                                                tile_int8<C, direct_rows(C::kWide), 1, false>};
  static constexpr TileFn kStreams[3] = {tile_int8<C, 1, 4, false>, tile_int8<C, 2, 2, false>,
                                         tile_int8<C, 3, 2, false>};
  return streams == 1 ? kSingle[rows - 1] : kStreams[rows - 1];
}

// Tiles of packed rows, which read the codes of C and may keep them for others.
template <class C, bool Keep>
TileFn packed_tile(std::int64_t rows) {
  static constexpr TileFn kTiles[kTile] = {tile_int8<C, 1, 1, Keep>, tile_int8<C, 2, 1, Keep>,
                                           tile_int8<C, 3, 1, Keep>, tile_int8<C, 4, 1, Keep>,
                                           tile_int8<C, 5, 1, Keep>, tile_int8<C, 6, 1, Keep>};
  return kTiles[rows - 1];
}

TileFn direct_tile(int bits, std::int64_t rows, int streams) {
  return bits == 2   ? direct_tile<2>(rows, streams)
         : bits == 3 ? direct_tile<3>(rows, streams)
         : bits == 4 ? direct_tile<4>(rows, streams)
                     : direct_tile<8>(rows, streams);
}
TileFn keeping_tile(int bits, std::int64_t rows) {
  return bits == 2   ? packed_tile<Codes<2>, true>(rows)
         : bits == 3 ? packed_tile<Codes<3>, true>(rows)
         : bits == 4 ? packed_tile<Codes<4>, true>(rows)
                     : packed_tile<Codes<8>, true>(rows);
}
TileFn kept_tile(int bits, std::int64_t rows) {
  return bits == 8 ? packed_tile<KeptCodes<true>, false>(rows) : packed_tile<KeptCodes<false>, false>(rows);
}

}  // namespace
}  // namespace qtale::cpu

// int8 qmatmul on AVX-512 VNNI over 64-row panels: unsigned codes against broadcast signed activations.
// Four registers hold one input quad of 64 rows; a tile of up to six rows of codes reuses each unpacked register.
// More rows take tiles of half a panel, where up to 13 reuse it: unpacking takes as long as multiplying a row.
// In int16 mode an activation row is two rows of codes, which share a row of outputs.
#include "cpu/codes_avx512.inl"

namespace qtale::cpu {
namespace {

// The activations of one tile, and the register of the panel that its first rows of weights are in.
struct TileIn {
  const std::int8_t* codes;
  const float* scales;
  const std::int32_t* sums;
  Prefetch prefetch;
  int first;
};

constexpr int kBehind = 6;  // rows that addresses reach from one pointer

template <int Bits, int M, int V>
QTALE_INLINE void multiply_step(__m512i (&acc)[M][V], const std::uint8_t* w, const std::int8_t* a,
                                const std::int8_t* behind, std::int64_t lda, const std::uint8_t*& ahead,
                                std::int64_t pace) {
  using C = Codes<Bits>;
  unroll<C::kFields>([&](auto field) QTALE_INLINE_LAMBDA {
    prefetch_part_of_step<C, field, M>(w, ahead, pace);
    __m512i code[V];
    unroll<V>([&](auto p) QTALE_INLINE_LAMBDA { code[p] = C::template get<field>(w, p); });
    unroll<M>([&](auto m) QTALE_INLINE_LAMBDA {
      const std::int8_t* row = m < kBehind ? a + m * lda : behind + (m - kBehind) * lda;
      const __m512i quad = broadcast4(row + 4 * field);
      unroll<V>([&](auto p) QTALE_INLINE_LAMBDA { acc[m][p] = _mm512_dpbusd_epi32(acc[m][p], code[p], quad); });
    });
  });
}

// What happens to the int32 sums of one block: an activation group is one block or several, whose scaled sums meet in
// `part` before the activation scale is applied once.
enum class Flush { channel, whole, first, middle, last };

template <int M, int V>
QTALE_INLINE void subtract_zero_points(__m512i (&acc)[M][V], const std::uint8_t* zeros, const std::int32_t* sums,
                                       std::int64_t ld_sums) {
  unroll<V>([&](auto p) QTALE_INLINE_LAMBDA {
    const __m512i zero = load_zeros(zeros, p);
    unroll<M>([&](auto m) QTALE_INLINE_LAMBDA {
      const __m512i sum = _mm512_set1_epi32(sums[m * ld_sums]);
      acc[m][p] = _mm512_sub_epi32(acc[m][p], _mm512_mullo_epi32(zero, sum));
    });
  });
}

template <Flush Mode, int Planes, int M, int V>
QTALE_INLINE void flush(const __m512i (&acc)[M][V], const std::uint8_t* scales, DType scale_dtype, int first,
                        const float* act, std::int64_t ld_act, float* part, __mmask16 keep, float* out) {
  __m512 scale[V];
  if constexpr (Mode != Flush::channel) load_scales(scale, scales, scale_dtype, first);
  constexpr bool kUnfinished = Mode == Flush::first || Mode == Flush::middle;
  unroll<M / Planes>([&](auto row) QTALE_INLINE_LAMBDA {
    __m512 activation[Planes];
    unroll<Planes>([&](auto plane) QTALE_INLINE_LAMBDA {
      activation[plane] = _mm512_set1_ps(act[(row * Planes + plane) * ld_act]);
    });
    unroll<V>([&](auto p) QTALE_INLINE_LAMBDA {
      float* o = out + row * kRows + 16 * p;
      __m512 sum;
      if constexpr (!kUnfinished) sum = _mm512_maskz_load_ps(keep, o);
      unroll<Planes>([&](auto plane) QTALE_INLINE_LAMBDA {
        constexpr int kRow = row * Planes + plane;
        float* t = part + kRow * kRows + 16 * p;
        __m512 value = _mm512_cvtepi32_ps(acc[kRow][p]);
        if constexpr (Mode == Flush::whole || Mode == Flush::first) value = _mm512_mul_ps(value, scale[p]);
        if constexpr (Mode == Flush::middle || Mode == Flush::last)
          value = _mm512_fmadd_ps(value, scale[p], _mm512_load_ps(t));
        if constexpr (kUnfinished) {
          _mm512_store_ps(t, value);
        } else {
          sum = _mm512_fmadd_ps(value, activation[plane], sum);
        }
      });
      if constexpr (!kUnfinished) _mm512_store_ps(o, sum);
    });
  });
}

// Products of one block as exact int32. The offset of the codes is taken off at the start of the sums or, where one
// scale serves the whole row, once at the end of it (kFromZero): zeroing a register is free, filling one is not.
template <int Bits, int M, int V, bool kFromZero>
QTALE_INLINE void multiply_block(__m512i (&acc)[M][V], const std::uint8_t* w, const std::int8_t* a, std::int64_t lda,
                                 std::int64_t steps, const std::int32_t* sums, std::int64_t ld_sums,
                                 const Prefetch& prefetch) {
  const std::uint8_t* ahead = prefetch.at(w);
  using C = Codes<Bits>;
  unroll<M>([&](auto m) QTALE_INLINE_LAMBDA {
    const __m512i start = kFromZero ? _mm512_setzero_si512() : _mm512_set1_epi32(-C::kOffset * sums[m * ld_sums]);
    unroll<V>([&](auto p) QTALE_INLINE_LAMBDA { acc[m][p] = start; });
  });
  const std::int8_t* behind = a + kBehind * lda;
#pragma GCC unroll 1
  for (; steps > 0; --steps, w += C::kBytes, a += C::kInputs, behind += C::kInputs) {
    // Two pointers to rows: left alone, g++ 12 keeps and moves one for each of them, most in memory.
    if constexpr (M > kBehind) asm volatile("" : "+r"(a), "+r"(behind));
    multiply_step<Bits, M, V>(acc, w, a, behind, lda, ahead, prefetch.pace);
  }
  // Else g++ 12 carries the output tile around this loop in spilled registers, or spills the sums inside it.
  asm volatile("" ::: "memory");
  unroll<M>([&](auto m) QTALE_INLINE_LAMBDA {
    unroll<V>([&](auto p) QTALE_INLINE_LAMBDA { asm volatile("" : "+v"(acc[m][p])); });
  });
}

// Adds M rows of codes times a span of activation groups of V registers of a panel with a scale per row and group to
// out [M / Planes][64].
template <int Bits, int Planes, int M, int V>
__attribute__((noipa)) void tile_grouped(const Layout& l, const std::uint8_t* panel, const TileIn in, const Span span,
                                         float* out) {
  alignas(64) float part[M * kRows];
  const std::int64_t per_group = kActGroup >> __builtin_ctzll(static_cast<std::uint64_t>(l.block_k));
  const std::int64_t steps = l.block_k / Codes<Bits>::kInputs;
  const std::int64_t stop = min64(span.end * per_group, l.blocks);
  std::int64_t b = span.begin * per_group;
  const std::uint8_t* block = panel + l.block_offset(b);
  const float* act = in.scales + span.begin;
  out += 16 * in.first;
  for (std::int64_t g = span.begin; b < stop; ++g, ++act) {
    const __mmask16 keep = keep_of(g);
    const std::int64_t count = min64(per_group, stop - b);
    for (std::int64_t i = 0; i < count; ++i, ++b) {
      __m512i acc[M][V];
      const std::int32_t* sums = in.sums + b;
      multiply_block<Bits, M, V, false>(acc, block + 64 * in.first, in.codes + b * l.block_k, l.k_padded, steps, sums,
                                        l.blocks, in.prefetch);
      const std::uint8_t* params = block + l.code_bytes;
      if (!l.symmetric) subtract_zero_points(acc, params + l.scale_bytes + 16 * in.first, sums, l.blocks);
      if (i == 0 && count == 1) {
        flush<Flush::whole, Planes>(acc, params, l.scale_dtype, in.first, act, l.act_groups, part, keep, out);
      } else if (i == 0) {
        flush<Flush::first, Planes>(acc, params, l.scale_dtype, in.first, act, l.act_groups, part, keep, out);
      } else if (i + 1 == count) {
        flush<Flush::last, Planes>(acc, params, l.scale_dtype, in.first, act, l.act_groups, part, keep, out);
      } else {
        flush<Flush::middle, Planes>(acc, params, l.scale_dtype, in.first, act, l.act_groups, part, keep, out);
      }
      block = params + l.param_bytes;
    }
  }
}

// The same for a panel with a scale per row; finish_channel ends it.
template <int Bits, int Planes, int M, int V>
__attribute__((noipa)) void tile_channel(const Layout& l, const std::uint8_t* panel, const TileIn in, const Span span,
                                         float* out) {
  out += 16 * in.first;
  for (std::int64_t g = span.begin; g < span.end; ++g) {
    __m512i acc[M][V];
    const std::int64_t k = g * kActGroup, size = min64(l.k_padded - k, kActGroup);
    multiply_block<Bits, M, V, true>(acc, panel + l.block_offset(g) + 64 * in.first, in.codes + k, l.k_padded,
                                     size / Codes<Bits>::kInputs, nullptr, 0, in.prefetch);
    flush<Flush::channel, Planes>(acc, nullptr, l.scale_dtype, 0, in.scales + g, l.act_groups, nullptr, keep_of(g),
                                  out);
  }
}

using TileFn = void (*)(const Layout&, const std::uint8_t*, TileIn, Span, float*);
struct TileFns {
  TileFn grouped, channel;
};

template <int Bits, int Planes, int V, int... Rows>
TileFns tile_of_rows(std::int64_t rows, std::integer_sequence<int, Rows...>) {
  static constexpr TileFns kTiles[] = {
      {tile_grouped<Bits, Planes, (Rows + 1) * Planes, V>, tile_channel<Bits, Planes, (Rows + 1) * Planes, V>}...};
  return kTiles[rows - 1];
}

template <int Planes, int Bits>
TileFns pick_tile(std::int64_t rows, bool half) {
  if constexpr (Bits < 8)
    if (half)
      return tile_of_rows<Bits, Planes, kVecs / 2>(rows, std::make_integer_sequence<int, kMaxHalfTile / Planes>{});
  return tile_of_rows<Bits, Planes, kVecs>(rows, std::make_integer_sequence<int, kMaxTile / Planes>{});
}

template <int Planes>
TileFns pick_tile(int num_bits, std::int64_t rows, bool half) {
  switch (num_bits) {
    case 2: return pick_tile<Planes, 2>(rows, half);
    case 3: return pick_tile<Planes, 3>(rows, half);
    case 4: return pick_tile<Planes, 4>(rows, half);
    default: return pick_tile<Planes, 8>(rows, false);
  }
}

// Blocks of 32 and 64 inputs scale their sums so often that twelve to sixteen registers of sums in a tile are best:
// more of that overlaps with products. But up to five rows one tile is better, as it reads weights better than two.
inline TileCut tile_cut(const Layout& l, std::int64_t rows, int planes) {
  rows *= planes;
  if (rows > kMaxTile && l.num_bits < 8 && l.block_k > 32)
    return {(l.block_k < kActGroup ? 8 : kMaxHalfTile) / planes, 2, planes};
  return {(l.block_k < kActGroup && rows >= kMaxTile ? 4 : kMaxTile) / planes, 1, planes};
}

template <int Planes>
void run_int8(const MatmulArgs& a, std::int64_t panel_begin, std::int64_t panel_end, std::int64_t row_begin,
              std::int64_t row_end) {
  const Layout& l = *a.layout;
  const Int8Rows acts(l, a.rows * Planes, a.workspace);
  const TileCut cut = tile_cut(l, row_end - row_begin, Planes);
  const auto tile = [&](std::int64_t panel, std::int64_t m, std::int64_t rows, int part, Span span, Prefetch prefetch,
                        float* out) {
    const std::int64_t row = m * Planes;
    const TileIn in{acts.codes + row * l.k_padded, acts.scales + row * l.act_groups, acts.sums + row * l.blocks,
                    prefetch, part * kVecs / cut.parts};
    const TileFns tiles = pick_tile<Planes>(l.num_bits, rows, cut.parts > 1);
    (l.per_channel ? tiles.channel : tiles.grouped)(l, a.panels + panel * l.panel_bytes, in, span, out);
  };
  const auto finish = [&](std::int64_t panel, std::int64_t m, std::int64_t rows, float* out) {
    if (l.per_channel) finish_channel(l, a.panels + panel * l.panel_bytes, acts.totals + m, rows, out);
  };
  run_tiles(a, {panel_begin, panel_end}, {row_begin, row_end}, l.act_groups, cut, tile, finish);
}

}  // namespace
}  // namespace qtale::cpu

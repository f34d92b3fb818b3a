// int8 qmatmul on AVX-512 VNNI over 64-row panels: unsigned codes against broadcast signed activations.
// Four registers hold one input quad of 64 rows; a tile of up to six activation rows reuses each unpacked register.
#include "cpu/codes_avx512.inl"

namespace qtale::cpu {
namespace {

// The activations of one tile.
struct TileIn {
  const std::int8_t* codes;
  const float* scales;
  const std::int32_t* sums;
  Prefetch prefetch;
};

template <int Bits, int M>
QTALE_INLINE void multiply_step(__m512i (&acc)[M][kVecs], const std::uint8_t* w, const std::int8_t* a, std::int64_t lda,
                                const std::uint8_t*& ahead, std::int64_t pace) {
  using C = Codes<Bits>;
  unroll<C::kFields>([&](auto field) QTALE_INLINE_LAMBDA {
    prefetch_part_of_step<C, field, M>(w, ahead, pace);
    __m512i code[kVecs];
    unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA { code[p] = C::template get<field>(w, p); });
    unroll<M>([&](auto m) QTALE_INLINE_LAMBDA {
      const __m512i quad = broadcast4(a + m * lda + 4 * field);
      unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA { acc[m][p] = _mm512_dpbusd_epi32(acc[m][p], code[p], quad); });
    });
  });
}

// What happens to the int32 sums of one block: an activation group is one block or several, whose scaled sums meet in
// `part` before the activation scale is applied once.
enum class Flush { channel, whole, first, middle, last };

template <int M>
QTALE_INLINE void subtract_zero_points(__m512i (&acc)[M][kVecs], const std::uint8_t* zeros, const std::int32_t* sums,
                                       std::int64_t ld_sums) {
  unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA {
    const __m512i zero = load_zeros(zeros, p);
    unroll<M>([&](auto m) QTALE_INLINE_LAMBDA {
      const __m512i sum = _mm512_set1_epi32(sums[m * ld_sums]);
      acc[m][p] = _mm512_sub_epi32(acc[m][p], _mm512_mullo_epi32(zero, sum));
    });
  });
}

template <Flush Mode, int M>
QTALE_INLINE void flush(const __m512i (&acc)[M][kVecs], const std::uint8_t* scales, DType scale_dtype, const float* act,
                        std::int64_t ld_act, float* part, __mmask16 keep, float* out) {
  __m512 scale[kVecs];
  if constexpr (Mode != Flush::channel) load_scales(scale, scales, scale_dtype);
  unroll<M>([&](auto m) QTALE_INLINE_LAMBDA {
    const __m512 activation = _mm512_set1_ps(act[m * ld_act]);
    unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA {
      float* o = out + m * kRows + 16 * p;
      float* t = part + m * kRows + 16 * p;
      __m512 value = _mm512_cvtepi32_ps(acc[m][p]);
      if constexpr (Mode == Flush::whole || Mode == Flush::first) value = _mm512_mul_ps(value, scale[p]);
      if constexpr (Mode == Flush::middle || Mode == Flush::last)
        value = _mm512_fmadd_ps(value, scale[p], _mm512_load_ps(t));
      if constexpr (Mode == Flush::first || Mode == Flush::middle) {
        _mm512_store_ps(t, value);
      } else {
        _mm512_store_ps(o, _mm512_fmadd_ps(value, activation, _mm512_maskz_load_ps(keep, o)));
      }
    });
  });
}

// Products of one block as exact int32. The offset of the codes is taken off at the start of the sums or, where one
// scale serves the whole row, once at the end of it (kFromZero): zeroing a register is free, filling one is not.
template <int Bits, int M, bool kFromZero>
QTALE_INLINE void multiply_block(__m512i (&acc)[M][kVecs], const std::uint8_t* w, const std::int8_t* a,
                                 std::int64_t lda, std::int64_t steps, const std::int32_t* sums, std::int64_t ld_sums,
                                 const Prefetch& prefetch) {
  const std::uint8_t* ahead = prefetch.at(w);
  using C = Codes<Bits>;
  unroll<M>([&](auto m) QTALE_INLINE_LAMBDA {
    const __m512i start = kFromZero ? _mm512_setzero_si512() : _mm512_set1_epi32(-C::kOffset * sums[m * ld_sums]);
    unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA { acc[m][p] = start; });
  });
#pragma GCC unroll 1
  for (; steps > 0; --steps, w += C::kBytes, a += C::kInputs)
    multiply_step<Bits, M>(acc, w, a, lda, ahead, prefetch.pace);
  // Else g++ 12 carries the output tile around this loop in spilled registers, or spills the sums inside it.
  asm volatile("" ::: "memory");
  unroll<M>([&](auto m) QTALE_INLINE_LAMBDA {
    unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA { asm volatile("" : "+v"(acc[m][p])); });
  });
}

// Adds M rows times a span of activation groups of a panel with a scale per row and group to out [M][64].
template <int Bits, int M>
__attribute__((noipa)) void tile_grouped(const Layout& l, const std::uint8_t* panel, const TileIn in, const Span span,
                                         float* out) {
  alignas(64) float part[M * kRows];
  const std::int64_t per_group = kActGroup >> __builtin_ctzll(static_cast<std::uint64_t>(l.block_k));
  const std::int64_t steps = l.block_k / Codes<Bits>::kInputs;
  const std::int64_t stop = min64(span.end * per_group, l.blocks);
  std::int64_t b = span.begin * per_group;
  const std::uint8_t* w = panel + l.block_offset(b);
  const float* act = in.scales + span.begin;
  for (std::int64_t g = span.begin; b < stop; ++g, ++act) {
    const __mmask16 keep = keep_of(g);
    const std::int64_t count = min64(per_group, stop - b);
    for (std::int64_t i = 0; i < count; ++i, ++b) {
      __m512i acc[M][kVecs];
      const std::int32_t* sums = in.sums + b;
      multiply_block<Bits, M, false>(acc, w, in.codes + b * l.block_k, l.k_padded, steps, sums, l.blocks, in.prefetch);
      const std::uint8_t* params = w + l.code_bytes;
      if (!l.symmetric) subtract_zero_points<M>(acc, params + l.scale_bytes, sums, l.blocks);
      if (i == 0 && count == 1) {
        flush<Flush::whole, M>(acc, params, l.scale_dtype, act, l.act_groups, part, keep, out);
      } else if (i == 0) {
        flush<Flush::first, M>(acc, params, l.scale_dtype, act, l.act_groups, part, keep, out);
      } else if (i + 1 == count) {
        flush<Flush::last, M>(acc, params, l.scale_dtype, act, l.act_groups, part, keep, out);
      } else {
        flush<Flush::middle, M>(acc, params, l.scale_dtype, act, l.act_groups, part, keep, out);
      }
      w = params + l.param_bytes;
    }
  }
}

// The same for a panel with a scale per row; finish_channel ends it.
template <int Bits, int M>
__attribute__((noipa)) void tile_channel(const Layout& l, const std::uint8_t* panel, const TileIn in, const Span span,
                                         float* out) {
  for (std::int64_t g = span.begin; g < span.end; ++g) {
    __m512i acc[M][kVecs];
    const std::int64_t k = g * kActGroup, size = min64(l.k_padded - k, kActGroup);
    multiply_block<Bits, M, true>(acc, panel + l.block_offset(g), in.codes + k, l.k_padded, size / Codes<Bits>::kInputs,
                                  nullptr, 0, in.prefetch);
    flush<Flush::channel, M>(acc, nullptr, l.scale_dtype, in.scales + g, l.act_groups, nullptr, keep_of(g), out);
  }
}

using TileFn = void (*)(const Layout&, const std::uint8_t*, TileIn, Span, float*);

template <int Bits>
TileFn tile_of_rows(std::int64_t rows, bool per_channel) {
  static constexpr TileFn kGrouped[kMaxTile] = {tile_grouped<Bits, 1>, tile_grouped<Bits, 2>, tile_grouped<Bits, 3>,
                                                tile_grouped<Bits, 4>, tile_grouped<Bits, 5>, tile_grouped<Bits, 6>};
  static constexpr TileFn kChannel[kMaxTile] = {tile_channel<Bits, 1>, tile_channel<Bits, 2>, tile_channel<Bits, 3>,
                                                tile_channel<Bits, 4>, tile_channel<Bits, 5>, tile_channel<Bits, 6>};
  return (per_channel ? kChannel : kGrouped)[rows - 1];
}

inline TileFn pick_tile(const Layout& l, std::int64_t rows) {
  switch (l.num_bits) {
    case 2: return tile_of_rows<2>(rows, l.per_channel);
    case 3: return tile_of_rows<3>(rows, l.per_channel);
    case 4: return tile_of_rows<4>(rows, l.per_channel);
    default: return tile_of_rows<8>(rows, l.per_channel);
  }
}

void run_int8(const MatmulArgs& a, std::int64_t panel_begin, std::int64_t panel_end, std::int64_t row_begin,
              std::int64_t row_end) {
  const Layout& l = *a.layout;
  const Int8Rows acts(l, a.rows, a.workspace);
  const auto tile = [&](std::int64_t panel, std::int64_t m, std::int64_t rows, Span span, Prefetch prefetch,
                        float* out) {
    const TileIn in{acts.codes + m * l.k_padded, acts.scales + m * l.act_groups, acts.sums + m * l.blocks, prefetch};
    pick_tile(l, rows)(l, a.panels + panel * l.panel_bytes, in, span, out);
  };
  const auto finish = [&](std::int64_t panel, std::int64_t m, std::int64_t rows, float* out) {
    if (l.per_channel) finish_channel(l, a.panels + panel * l.panel_bytes, acts.totals + m, rows, out);
  };
  // Small blocks scale their sums so often that three or four rows in a tile are best: more of that overlaps with
  // products. But up to five rows one tile is better, as it reads weights better than two.
  const int tile_rows = l.block_k < kActGroup && row_end - row_begin >= kMaxTile ? 4 : kMaxTile;
  run_tiles(a, {panel_begin, panel_end}, {row_begin, row_end}, l.act_groups, tile_rows, tile, finish);
}

}  // namespace
}  // namespace qtale::cpu

// Float qmatmul on AVX-512 over 64-row panels; products and sums are float32.
// A code is masked out where it stands in its 32-bit lane and converted there, so it comes with a factor 2^position;
// the activations it meets carry the inverse factor, which is exact. That saves the shifts, whose two ports would be
// the limit of the decode loop.
#include "cpu/float_activations.inl"

namespace qtale::cpu {
namespace {

constexpr int kFloatTile = 5;  // activation rows

// Bits of 2 and 4 are masked out of their line, others out of the bytes that Codes::get makes.
template <int Bits>
constexpr bool kInPlace = Bits == 2 || Bits == 4;

// Position of input 4 * field + j in its lane; the topmost code is shifted down, as it would touch the sign.
template <int Bits>
constexpr int lane_position(int field, int j) {
  const int position = 8 * j + (kInPlace<Bits> ? Bits * field : 0);
  return position + (kInPlace<Bits> ? Bits : 8) == 32 ? 0 : position;
}

template <int Bits, int Field, int J>
QTALE_INLINE __m512 code_values(__m512i line) {
  constexpr int kWidthBits = kInPlace<Bits> ? Bits : 8;
  constexpr int kPosition = lane_position<Bits>(Field, J);
  if constexpr (J == 3 && kPosition == 0) return _mm512_cvtepi32_ps(_mm512_srli_epi32(line, 32 - kWidthBits));
  constexpr auto kMask = static_cast<int>(((1u << kWidthBits) - 1u) << kPosition);
  return _mm512_cvtepi32_ps(_mm512_and_si512(line, _mm512_set1_epi32(kMask)));
}

template <int Bits, int M>
QTALE_INLINE void multiply_step_float(__m512 (&acc)[M][kVecs], const std::uint8_t* w, const float* x, std::int64_t ldx,
                                      const std::uint8_t*& ahead, std::int64_t pace) {
  using C = Codes<Bits>;
  unroll<C::kFields>([&](auto field) QTALE_INLINE_LAMBDA {
    prefetch_part_of_step<C, field, M>(w, ahead, pace);
    __m512i line[kVecs];
    unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA {
      line[p] = kInPlace<Bits> ? load_line(w + 64 * p) : C::template get<field>(w, p);
    });
    unroll<4>([&](auto j) QTALE_INLINE_LAMBDA {
      __m512 value[kVecs];
      unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA { value[p] = code_values<Bits, field, j>(line[p]); });
      unroll<M>([&](auto m) QTALE_INLINE_LAMBDA {
        const __m512 input = _mm512_set1_ps(x[m * ldx + 4 * field + j]);
        unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA { acc[m][p] = _mm512_fmadd_ps(value[p], input, acc[m][p]); });
      });
    });
  });
}

// Multiplies prepared activations by the inverse of the factor their codes come with.
template <int Bits>
inline void scale_to_positions(float* values, std::int64_t count) {
  alignas(64) float factor[16];
  for (int i = 0; i < 16; ++i)
    factor[i] = 1.0f / static_cast<float>(1u << lane_position<Bits>(i / 4 % Codes<Bits>::kFields, i % 4));
  const __m512 factors = _mm512_load_ps(factor);
  for (std::int64_t k = 0; k < count; k += 16) store_f32(values + k, mul(load_f32(values + k), factors));
}

void prepare_float_positions(const MatmulArgs& a, std::int64_t begin, std::int64_t end) {
  prepare_float_rows(a, begin, end);
  const Layout& l = *a.layout;
  float* values = FloatRows(l, a.rows, a.workspace).values + begin * l.k_padded;
  const std::int64_t count = (end - begin) * l.k_padded;
  switch (l.num_bits) {
    case 2: return scale_to_positions<2>(values, count);
    case 3: return scale_to_positions<3>(values, count);
    case 4: return scale_to_positions<4>(values, count);
    default: return scale_to_positions<8>(values, count);
  }
}

// Adds M rows times blocks [begin, end) of one panel to out [M][64].
template <int Bits, int M>
__attribute__((noipa)) void tile_float(const Layout& l, const std::uint8_t* panel, const float* x, const float* sums,
                                       const Span blocks, const Prefetch prefetch, float* out) {
  using C = Codes<Bits>;
  for (std::int64_t b = blocks.begin; b < blocks.end; ++b) {
    const std::uint8_t* w = panel + l.block_offset(b);
    const std::uint8_t* ahead = prefetch.at(w);
    const float* a = x + b * l.block_k;
    const std::int64_t steps = l.block_size(b) / C::kInputs;
    __m512 acc[M][kVecs];
    unroll<M>([&](auto m) QTALE_INLINE_LAMBDA {
      unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA { acc[m][p] = _mm512_setzero_ps(); });
    });
#pragma GCC unroll 1
    for (std::int64_t s = 0; s < steps; ++s, w += C::kBytes, a += C::kInputs)
      multiply_step_float<Bits, M>(acc, w, a, l.k_padded, ahead, prefetch.pace);
    asm volatile("" ::: "memory");  // as in multiply_block
    unroll<M>([&](auto m) QTALE_INLINE_LAMBDA {
      unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA { asm volatile("" : "+v"(acc[m][p])); });
    });
    const std::uint8_t* params = panel + l.param_offset(b);
    __m512 scales[kVecs];
    load_scales(scales, params, l.scale_dtype);
    unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA {
      __m512 zero = _mm512_set1_ps(static_cast<float>(C::kOffset));
      if (!l.symmetric) zero = _mm512_add_ps(zero, _mm512_cvtepi32_ps(load_zeros(params + l.scale_bytes, p)));
      unroll<M>([&](auto m) QTALE_INLINE_LAMBDA {
        const __m512 sum = _mm512_fnmadd_ps(zero, _mm512_set1_ps(sums[m * l.blocks + b]), acc[m][p]);
        float* o = out + m * kRows + 16 * p;
        _mm512_store_ps(o, _mm512_fmadd_ps(sum, scales[p], _mm512_maskz_load_ps(keep_of(b), o)));
      });
    });
  }
}

using FloatTileFn = void (*)(const Layout&, const std::uint8_t*, const float*, const float*, Span, Prefetch, float*);

template <int Bits>
FloatTileFn float_tile_of_rows(std::int64_t rows) {
  static constexpr FloatTileFn kTiles[kFloatTile] = {tile_float<Bits, 1>, tile_float<Bits, 2>, tile_float<Bits, 3>,
                                                     tile_float<Bits, 4>, tile_float<Bits, 5>};
  return kTiles[rows - 1];
}

inline FloatTileFn pick_float_tile(int num_bits, std::int64_t rows) {
  switch (num_bits) {
    case 2: return float_tile_of_rows<2>(rows);
    case 3: return float_tile_of_rows<3>(rows);
    case 4: return float_tile_of_rows<4>(rows);
    default: return float_tile_of_rows<8>(rows);
  }
}

void run_float(const MatmulArgs& a, std::int64_t panel_begin, std::int64_t panel_end, std::int64_t row_begin,
               std::int64_t row_end) {
  const Layout& l = *a.layout;
  const FloatRows acts(l, a.rows, a.workspace);
  const auto tile = [&](std::int64_t panel, std::int64_t m, std::int64_t rows, int, Span blocks, Prefetch prefetch,
                        float* out) {
    pick_float_tile(l.num_bits, rows)(l, a.panels + panel * l.panel_bytes, acts.values + m * l.k_padded,
                                      acts.sums + m * l.blocks, blocks, prefetch, out);
  };
  run_tiles(a, {panel_begin, panel_end}, {row_begin, row_end}, l.blocks, {kFloatTile}, tile, [](auto&&...) {});
}

}  // namespace
}  // namespace qtale::cpu

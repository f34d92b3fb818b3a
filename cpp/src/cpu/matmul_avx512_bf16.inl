// Float qmatmul on AVX-512 BF16 over 64-row panels of 2, 3 and 4 bits. A table in a register turns codes into bf16, two
// to a 32-bit lane, which meet pairs of activations. An activation is one bf16 number, or the sum of two where its
// dtype holds more than 8 significant bits; the two are planes, rows of their own to the kernel.
#include "cpu/codes_avx512.inl"

namespace qtale::cpu {
namespace {

// The workspace. A row of planes is [planes, k_padded]; inputs 1 and 2 of every four change places, so that those that
// meet in a lane stand side by side.
struct PlaneRows {
  std::int64_t planes;
  std::uint16_t* values;  // [rows, planes, k_padded] bf16
  float* sums;            // [rows, blocks]
  std::size_t bytes;

  PlaneRows(const Layout& l, std::int64_t rows, DType dtype, std::byte* workspace)
      : planes(dtype == DType::bf16 ? 1 : 2), values(reinterpret_cast<std::uint16_t*>(workspace)) {
    const std::size_t value_bytes = aligned(static_cast<std::size_t>(rows * planes * l.k_padded) * sizeof *values);
    sums = reinterpret_cast<float*>(workspace + value_bytes);
    bytes = value_bytes + aligned(static_cast<std::size_t>(rows * l.blocks) * sizeof(float));
  }
};

std::size_t plane_rows_bytes(const Layout& l, std::int64_t rows) {
  return l.num_bits == 8 ? avx512_table.floating.workspace_bytes(l, rows)
                         : PlaneRows(l, rows, DType::f32, nullptr).bytes;
}

QTALE_INLINE __m512 widen(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

// Sixteen activations to one or two planes. What is left over of one that is not finite is nothing.
inline void store_planes(__m512 v, std::uint16_t* first, std::uint16_t* second) {
  const __m512 x = _mm512_permute_ps(v, 0xd8);
  const __m512 most = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f7f0000));  // a larger one would round to infinity
  const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(FLT_MAX), _CMP_LE_OQ);
  const __m512 low = _mm512_sub_ps(_mm512_setzero_ps(), most);
  const __m512 kept = _mm512_mask_max_ps(x, finite, _mm512_min_ps(x, most), low);
  const auto high = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(kept));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), high);
  if (second == nullptr) return;
  const __m512 rest = _mm512_maskz_sub_ps(finite, x, widen(high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(second), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(rest)));
}

void prepare_planes(const MatmulArgs& a, std::int64_t begin, std::int64_t end) {
  const Layout& l = *a.layout;
  if (l.num_bits == 8) return avx512_table.floating.prepare(a, begin, end);
  const PlaneRows out(l, a.rows, a.x.dtype, a.workspace);
  with_type(a.x.dtype, [&](auto element) {
    using E = decltype(element);
    for (std::int64_t m = begin; m < end; ++m) {
      const auto* row = static_cast<const typename E::T*>(a.x.data) + m * a.x.stride;
      std::uint16_t* first = out.values + m * out.planes * l.k_padded;
      for (std::int64_t b = 0; b < l.blocks; ++b) {
        VecF sum = set1(0.0f);
        for (std::int64_t k = b * l.block_k, stop = k + l.block_size(b); k < stop; k += kWidth) {
          const std::int64_t rest = l.k - k;
          const VecF v = rest >= kWidth ? E::load(row + k) : rest > 0 ? load_part<E>(row + k, rest) : set1(0.0f);
          store_planes(v, first + k, out.planes == 2 ? first + l.k_padded + k : nullptr);
          sum = add(sum, v);
        }
        out.sums[m * l.blocks + b] = reduce_add(sum);
      }
    }
  });
}

// Codes as they lie in the low bits of 16-bit lanes, with others above them, which the table does not look at: inputs
// 4 * Field + Odd and 4 * Field + Odd + 2 of 16 rows.
template <int Bits, int Field, int Odd>
QTALE_INLINE __m512i code_words(const std::uint8_t* w, int p) {
  if constexpr (Bits == 3 && Field >= 6) {
    const __m512i low = _mm512_srli_epi16(load_line(w + 256 * (Field - 6) + 64 * p), 6 + 8 * Odd);
    const __m512i high = _mm512_srli_epi16(load_line(w + 512 + 64 * p), Field - 2 + 8 * Odd);
    return _mm512_ternarylogic_epi32(high, low, _mm512_set1_epi16(3), kSelect);
  } else {
    constexpr int kLine = Bits == 3 ? Field / 2 : 0;
    constexpr int kShift = 8 * Odd + (Bits == 3 ? Field % 2 * 3 : Field * Bits);
    const __m512i line = load_line(w + 256 * kLine + 64 * p);
    return kShift ? _mm512_srli_epi16(line, kShift) : line;
  }
}

// bf16 of code - 2^(b-1) at index code, whatever the bits of the index above the code.
template <int Bits>
inline __m512i code_table() {
  alignas(64) float value[32];
  for (int i = 0; i < 32; ++i) value[i] = static_cast<float>(i % (1 << Bits) - (1 << (Bits - 1)));
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_load_ps(value + 16), _mm512_load_ps(value)));
}

template <int Bits, int R>
QTALE_INLINE void multiply_step_bf16(__m512 (&acc)[R][kVecs], __m512i table, const std::uint8_t* w,
                                     const std::uint16_t* x, std::int64_t ldx, const std::uint8_t*& ahead,
                                     std::int64_t pace) {
  using C = Codes<Bits>;
  unroll<C::kFields>([&](auto field) QTALE_INLINE_LAMBDA {
    prefetch_part_of_step<C, field, R>(w, ahead, pace);
    unroll<2>([&](auto odd) QTALE_INLINE_LAMBDA {
      __m512i value[kVecs];
      unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA {
        value[p] = _mm512_permutexvar_epi16(code_words<Bits, field, odd>(w, p), table);
      });
      unroll<R>([&](auto r) QTALE_INLINE_LAMBDA {
        const __m512i pair = broadcast4(reinterpret_cast<const std::int8_t*>(x + r * ldx + 4 * field + 2 * odd));
        unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA {
          acc[r][p] =
              _mm512_dpbf16_ps(acc[r][p], reinterpret_cast<__m512bh>(value[p]), reinterpret_cast<__m512bh>(pair));
        });
      });
    });
  });
}

// Adds M rows times blocks [begin, end) of one panel to out [M][64].
template <int Bits, int Planes, int M>
__attribute__((noipa)) void tile_bf16(const Layout& l, const std::uint8_t* panel, const std::uint16_t* x,
                                      const float* sums, const Span blocks, const Prefetch prefetch, float* out) {
  using C = Codes<Bits>;
  constexpr int R = M * Planes;
  const __m512i table = code_table<Bits>();
  for (std::int64_t b = blocks.begin; b < blocks.end; ++b) {
    const std::uint8_t* w = panel + l.block_offset(b);
    const std::uint8_t* ahead = prefetch.at(w);
    const std::uint16_t* a = x + b * l.block_k;
    const std::int64_t steps = l.block_size(b) / C::kInputs;
    __m512 acc[R][kVecs];
    const auto each_sum = [&](auto&& fn) QTALE_INLINE_LAMBDA {
      unroll<R * kVecs>([&](auto i) QTALE_INLINE_LAMBDA { fn(acc[i / kVecs][i % kVecs]); });
    };
    each_sum([](__m512& sum) QTALE_INLINE_LAMBDA { sum = _mm512_setzero_ps(); });
#pragma GCC unroll 1
    for (std::int64_t s = 0; s < steps; ++s, w += C::kBytes, a += C::kInputs)
      multiply_step_bf16<Bits, R>(acc, table, w, a, l.k_padded, ahead, prefetch.pace);
    asm volatile("" ::: "memory");  // as in multiply_block
    each_sum([](__m512& sum) QTALE_INLINE_LAMBDA { asm volatile("" : "+v"(sum)); });
    const std::uint8_t* params = panel + l.param_offset(b);
    __m512 scales[kVecs];
    load_scales(scales, params, l.scale_dtype);
    unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA {
      const __m512 zero = l.symmetric ? _mm512_setzero_ps() : _mm512_cvtepi32_ps(load_zeros(params + l.scale_bytes, p));
      unroll<M>([&](auto m) QTALE_INLINE_LAMBDA {
        __m512 sum = acc[m * Planes][p];
        if constexpr (Planes == 2) sum = _mm512_add_ps(sum, acc[m * Planes + 1][p]);
        if (!l.symmetric) sum = _mm512_fnmadd_ps(zero, _mm512_set1_ps(sums[m * l.blocks + b]), sum);
        float* o = out + m * kRows + 16 * p;
        _mm512_store_ps(o, _mm512_fmadd_ps(sum, scales[p], _mm512_maskz_load_ps(keep_of(b), o)));
      });
    });
  }
}

using PlaneTileFn = void (*)(const Layout&, const std::uint8_t*, const std::uint16_t*, const float*, Span, Prefetch,
                             float*);

template <int Bits>
PlaneTileFn plane_tile(std::int64_t planes, std::int64_t rows) {
  static constexpr PlaneTileFn kOne[] = {tile_bf16<Bits, 1, 1>, tile_bf16<Bits, 1, 2>, tile_bf16<Bits, 1, 3>,
                                         tile_bf16<Bits, 1, 4>, tile_bf16<Bits, 1, 5>, tile_bf16<Bits, 1, 6>};
  static constexpr PlaneTileFn kTwo[] = {tile_bf16<Bits, 2, 1>, tile_bf16<Bits, 2, 2>, tile_bf16<Bits, 2, 3>};
  return planes == 1 ? kOne[rows - 1] : kTwo[rows - 1];
}

inline PlaneTileFn pick_plane_tile(int num_bits, std::int64_t planes, std::int64_t rows) {
  switch (num_bits) {
    case 2: return plane_tile<2>(planes, rows);
    case 3: return plane_tile<3>(planes, rows);
    default: return plane_tile<4>(planes, rows);
  }
}

void run_planes(const MatmulArgs& a, std::int64_t panel_begin, std::int64_t panel_end, std::int64_t row_begin,
                std::int64_t row_end) {
  const Layout& l = *a.layout;
  if (l.num_bits == 8) return avx512_table.floating.run(a, panel_begin, panel_end, row_begin, row_end);
  const PlaneRows acts(l, a.rows, a.x.dtype, a.workspace);
  const auto tile = [&](std::int64_t panel, std::int64_t m, std::int64_t rows, int, Span blocks, Prefetch prefetch,
                        float* out) {
    pick_plane_tile(l.num_bits, acts.planes, rows)(l, a.panels + panel * l.panel_bytes,
                                                   acts.values + m * acts.planes * l.k_padded, acts.sums + m * l.blocks,
                                                   blocks, prefetch, out);
  };
  const Span panels{panel_begin, panel_end}, rows{row_begin, row_end};
  run_tiles(a, panels, rows, l.blocks, {kMaxTile / acts.planes}, tile, [](auto&&...) {});
}

}  // namespace
}  // namespace qtale::cpu

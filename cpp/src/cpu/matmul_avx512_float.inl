// Float qmatmul on AVX-512 over 64-row panels: codes become float32 in registers by a table look-up (vpermps) and meet
// broadcast float32 activations; products and sums are float32.
#include "cpu/float_activations.inl"

namespace qtale::cpu {
namespace {

// Float values of input 4 * field + j of sixteen rows, from the bytes that Codes<Bits>::get returns.
template <int Bits>
inline __m512 code_values(__m512i bytes, int j, __m512 table) {
  if constexpr (Bits == 8) {
    const __m512i code = _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(code, static_cast<unsigned>(24 - 8 * j)), 24));
  } else {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, static_cast<unsigned>(8 * j)), table);
  }
}

template <int Bits>
inline __m512 code_table() {
  alignas(64) float values[16];
  for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(i - (1 << (Bits - 1)));
  return _mm512_load_ps(values);
}

template <int Bits, int Field, int M>
inline void multiply_field_float(__m512 (&acc)[M][kVecs], const std::uint8_t* w, const float* x, std::int64_t ldx,
                                 __m512 table) {
  __m512i bytes[kVecs];
  QTALE_UNROLL for (int p = 0; p < kVecs; ++p) bytes[p] = Codes<Bits>::template get<Field>(w, p);
  QTALE_UNROLL for (int j = 0; j < 4; ++j) {
    __m512 value[kVecs];
    QTALE_UNROLL for (int p = 0; p < kVecs; ++p) value[p] = code_values<Bits>(bytes[p], j, table);
    QTALE_UNROLL for (int m = 0; m < M; ++m) {
      const __m512 input = _mm512_set1_ps(x[m * ldx + 4 * Field + j]);
      QTALE_UNROLL for (int p = 0; p < kVecs; ++p) acc[m][p] = _mm512_fmadd_ps(value[p], input, acc[m][p]);
    }
  }
}

template <int Bits, int M>
inline void multiply_step_float(__m512 (&acc)[M][kVecs], const std::uint8_t* w, const float* x, std::int64_t ldx,
                                __m512 table) {
  using C = Codes<Bits>;
  QTALE_UNROLL for (int line = 0; line < C::kBytes / 64; ++line)
    _mm_prefetch(reinterpret_cast<const char*>(w) + kPrefetch + 64 * line, _MM_HINT_T0);
  multiply_field_float<Bits, 0, M>(acc, w, x, ldx, table);
  if constexpr (C::kFields > 1) multiply_field_float<Bits, 1, M>(acc, w, x, ldx, table);
  if constexpr (C::kFields > 2) {
    multiply_field_float<Bits, 2, M>(acc, w, x, ldx, table);
    multiply_field_float<Bits, 3, M>(acc, w, x, ldx, table);
  }
}

template <int Bits, int M>
__attribute__((noipa)) void tile_float(const Layout& l, const std::uint8_t* panel, const float* x, const float* sums,
                                       float* out) {
  using C = Codes<Bits>;
  const __m512 table = code_table<Bits>();
  for (std::int64_t b = 0; b < l.blocks; ++b) {
    const std::uint8_t* w = panel + l.block_offset(b);
    const float* a = x + b * l.block_k;
    const std::int64_t steps = l.block_size(b) / C::kInputs;
    __m512 acc[M][kVecs];
    QTALE_UNROLL for (int m = 0; m < M; ++m) QTALE_UNROLL for (int p = 0; p < kVecs; ++p) acc[m][p] = _mm512_setzero_ps();
#pragma GCC unroll 1
    for (std::int64_t s = 0; s < steps; ++s, w += C::kBytes, a += C::kInputs)
      multiply_step_float<Bits, M>(acc, w, a, l.k_padded, table);
    const std::uint8_t* params = panel + l.param_offset(b);
    QTALE_UNROLL for (int p = 0; p < kVecs; ++p) {
      const __m512 scale = load_scales(params, l.scale_dtype, p);
      QTALE_UNROLL for (int m = 0; m < M; ++m) {
        __m512 sum = acc[m][p];
        if (!l.symmetric) {
          const __m512 zero = _mm512_cvtepi32_ps(load_zeros(params + l.scale_bytes, p));
          sum = _mm512_fnmadd_ps(zero, _mm512_set1_ps(sums[m * l.blocks + b]), sum);
        }
        float* o = out + m * kRows + 16 * p;
        const __m512 before = b == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(o);
        _mm512_storeu_ps(o, _mm512_fmadd_ps(sum, scale, before));
      }
    }
  }
}

using FloatTileFn = void (*)(const Layout&, const std::uint8_t*, const float*, const float*, float*);

template <int Bits>
FloatTileFn float_tile_of_rows(std::int64_t rows) {
  static constexpr FloatTileFn kTiles[kTile] = {tile_float<Bits, 1>, tile_float<Bits, 2>, tile_float<Bits, 3>,
                                                tile_float<Bits, 4>, tile_float<Bits, 5>, tile_float<Bits, 6>};
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
  alignas(64) float out[kTile * kRows];
  for (std::int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const std::int64_t col = panel * kRows;
    for (std::int64_t m = row_begin; m < row_end;) {
      const std::int64_t rows = next_tile(row_end - m, kTile);
      pick_float_tile(l.num_bits, rows)(l, a.panels + panel * l.panel_bytes, acts.values + m * l.k_padded,
                                        acts.sums + m * l.blocks, out);
      for (std::int64_t i = 0; i < rows; ++i)
        store_outputs(a, m + i, col, out + i * kRows, min64(kRows, l.n - col));
      m += rows;
    }
  }
}

}  // namespace
}  // namespace qtale::cpu

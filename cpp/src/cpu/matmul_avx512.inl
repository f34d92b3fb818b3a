// int8 qmatmul on AVX-512 VNNI over 64-row panels: unsigned codes against broadcast signed activations.
// Four registers hold one input quad of 64 rows; a tile of up to six activation rows reuses each unpacked register.
#include <immintrin.h>

#include "cpu/activations.inl"

namespace qtale::cpu {
namespace {

constexpr int kRows = 64;
constexpr int kVecs = 4;       // registers of 16 rows
constexpr int kTile = 6;       // activation rows: 24 accumulators leave room for the weights
constexpr int kPrefetch = 4096;

#define QTALE_UNROLL _Pragma("GCC unroll 8")

inline __m512i load_line(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
inline __m512i broadcast4(const std::int8_t* p) {
  std::int32_t word;
  std::memcpy(&word, p, sizeof word);
  return _mm512_set1_epi32(word);
}

// How the codes of `kInputs` inputs lie in `kBytes` bytes, read as `kFields` registers of 4 inputs per row quarter.
template <int Bits>
struct Codes;
template <>
struct Codes<8> {
  static constexpr int kInputs = 4, kFields = 1, kBytes = 256, kOffset = 128;
  template <int Field>
  static __m512i get(const std::uint8_t* w, int p) {
    return load_line(w + 64 * p);
  }
};
template <>
struct Codes<4> {
  static constexpr int kInputs = 8, kFields = 2, kBytes = 256, kOffset = 8;
  template <int Field>
  static __m512i get(const std::uint8_t* w, int p) {
    const __m512i line = load_line(w + 64 * p);
    return _mm512_and_si512(Field ? _mm512_srli_epi32(line, 4) : line, _mm512_set1_epi8(15));
  }
};
template <>
struct Codes<2> {
  static constexpr int kInputs = 16, kFields = 4, kBytes = 256, kOffset = 2;
  template <int Field>
  static __m512i get(const std::uint8_t* w, int p) {
    const __m512i line = load_line(w + 64 * p);
    return _mm512_and_si512(Field ? _mm512_srli_epi32(line, 2 * Field) : line, _mm512_set1_epi8(3));
  }
};
template <>
struct Codes<3> {
  static constexpr int kInputs = 16, kFields = 4, kBytes = 384, kOffset = 4;
  template <int Field>
  static __m512i get(const std::uint8_t* w, int p) {
    const __m512i low = Codes<2>::get<Field>(w, p);
    std::uint64_t high;
    std::memcpy(&high, w + 256 + 8 * (4 * Field + p), sizeof high);
    return _mm512_mask_add_epi8(low, _cvtu64_mask64(high), low, _mm512_set1_epi8(4));
  }
};

inline __m512 load_scales(const std::uint8_t* p, DType dtype, int v) {
  if (dtype == DType::f16) return load_f16(reinterpret_cast<const std::uint16_t*>(p) + 16 * v);
  if (dtype == DType::bf16) return load_bf16(reinterpret_cast<const std::uint16_t*>(p) + 16 * v);
  return load_f32(reinterpret_cast<const float*>(p) + 16 * v);
}

inline __m512i load_zeros(const std::uint8_t* p, int v) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * v)));
}

// The activations of one tile.
struct TileIn {
  const std::int8_t* codes;
  const float* scales;
  const std::int32_t* sums;
};

template <int Bits, int Field, int M>
inline void multiply_field(__m512i (&acc)[M][kVecs], const std::uint8_t* w, const std::int8_t* a, std::int64_t lda) {
  __m512i code[kVecs];
  QTALE_UNROLL for (int p = 0; p < kVecs; ++p) code[p] = Codes<Bits>::template get<Field>(w, p);
  QTALE_UNROLL for (int m = 0; m < M; ++m) {
    const __m512i quad = broadcast4(a + m * lda + 4 * Field);
    QTALE_UNROLL for (int p = 0; p < kVecs; ++p) acc[m][p] = _mm512_dpbusd_epi32(acc[m][p], code[p], quad);
  }
}

template <int Bits, int M>
inline void multiply_step(__m512i (&acc)[M][kVecs], const std::uint8_t* w, const std::int8_t* a, std::int64_t lda) {
  using C = Codes<Bits>;
  QTALE_UNROLL for (int line = 0; line < C::kBytes / 64; ++line)
    _mm_prefetch(reinterpret_cast<const char*>(w) + kPrefetch + 64 * line, _MM_HINT_T0);
  multiply_field<Bits, 0, M>(acc, w, a, lda);
  if constexpr (C::kFields > 1) multiply_field<Bits, 1, M>(acc, w, a, lda);
  if constexpr (C::kFields > 2) {
    multiply_field<Bits, 2, M>(acc, w, a, lda);
    multiply_field<Bits, 3, M>(acc, w, a, lda);
  }
}

// M rows times one panel into out [M][64]. part keeps the sums of one activation group when it spans several blocks.
template <int Bits, int M>
__attribute__((noipa)) void tile_int8(const Layout& l, const std::uint8_t* panel, const TileIn in, float* out) {
  using C = Codes<Bits>;
  alignas(64) float part[M][kRows];
  const std::int64_t lda = l.k_padded, blocks = l.blocks;
  const std::int64_t per_group = l.block_k < kActGroup ? kActGroup / l.block_k : 1;
  const __m512 one = _mm512_set1_ps(1.0f);
  QTALE_UNROLL for (int m = 0; m < M; ++m)
    QTALE_UNROLL for (int p = 0; p < kVecs; ++p) _mm512_storeu_ps(out + m * kRows + 16 * p, _mm512_setzero_ps());
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::uint8_t* w = panel + l.block_offset(b);
    const std::int8_t* a = in.codes + b * l.block_k;
    const std::int64_t steps = l.block_size(b) / C::kInputs;
    __m512i acc[M][kVecs];
    QTALE_UNROLL for (int m = 0; m < M; ++m) {
      const __m512i start = _mm512_set1_epi32(-C::kOffset * in.sums[m * blocks + b]);
      QTALE_UNROLL for (int p = 0; p < kVecs; ++p) acc[m][p] = start;
    }
#pragma GCC unroll 1
    for (std::int64_t s = 0; s < steps; ++s, w += C::kBytes, a += C::kInputs) multiply_step<Bits, M>(acc, w, a, lda);
    const std::uint8_t* params = panel + l.param_offset(b);
    const bool first = b % per_group == 0, last = b + 1 == blocks || (b + 1) % per_group == 0;
    QTALE_UNROLL for (int p = 0; p < kVecs; ++p) {
      const __m512 scale = l.per_channel ? one : load_scales(params, l.scale_dtype, p);
      QTALE_UNROLL for (int m = 0; m < M; ++m) {
        __m512i sum = acc[m][p];
        if (!l.symmetric) {
          const __m512i correction = _mm512_set1_epi32(in.sums[m * blocks + b]);
          sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(load_zeros(params + l.scale_bytes, p), correction));
        }
        __m512 value = _mm512_cvtepi32_ps(sum);
        value = first ? _mm512_mul_ps(value, scale) : _mm512_fmadd_ps(value, scale, _mm512_load_ps(part[m] + 16 * p));
        if (!last) {
          _mm512_store_ps(part[m] + 16 * p, value);
        } else {
          const __m512 act = _mm512_set1_ps(in.scales[m * l.act_groups + b / per_group]);
          float* o = out + m * kRows + 16 * p;
          _mm512_storeu_ps(o, _mm512_fmadd_ps(value, act, _mm512_loadu_ps(o)));
        }
      }
    }
  }
  if (!l.per_channel) return;
  const std::uint8_t* params = panel + l.param_offset(0);
  QTALE_UNROLL for (int p = 0; p < kVecs; ++p) {
    const __m512 scale = load_scales(params, l.scale_dtype, p);
    QTALE_UNROLL for (int m = 0; m < M; ++m) {
      float* o = out + m * kRows + 16 * p;
      _mm512_storeu_ps(o, _mm512_mul_ps(_mm512_loadu_ps(o), scale));
    }
  }
}

using TileFn = void (*)(const Layout&, const std::uint8_t*, TileIn, float*);

template <int Bits>
TileFn tile_of_rows(std::int64_t rows) {
  static constexpr TileFn kTiles[kTile] = {tile_int8<Bits, 1>, tile_int8<Bits, 2>, tile_int8<Bits, 3>,
                                           tile_int8<Bits, 4>, tile_int8<Bits, 5>, tile_int8<Bits, 6>};
  return kTiles[rows - 1];
}

inline TileFn pick_tile(int num_bits, std::int64_t rows) {
  switch (num_bits) {
    case 2: return tile_of_rows<2>(rows);
    case 3: return tile_of_rows<3>(rows);
    case 4: return tile_of_rows<4>(rows);
    default: return tile_of_rows<8>(rows);
  }
}

void run_int8(const MatmulArgs& a, std::int64_t panel_begin, std::int64_t panel_end, std::int64_t row_begin,
              std::int64_t row_end) {
  const Layout& l = *a.layout;
  const Int8Rows acts(l, a.rows, a.workspace);
  alignas(64) float out[kTile * kRows];
  for (std::int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const std::int64_t col = panel * kRows;
    for (std::int64_t m = row_begin; m < row_end;) {
      const std::int64_t rows = next_tile(row_end - m, kTile);
      const TileIn in{acts.codes + m * l.k_padded, acts.scales + m * l.act_groups, acts.sums + m * l.blocks};
      pick_tile(l.num_bits, rows)(l, a.panels + panel * l.panel_bytes, in, out);
      for (std::int64_t i = 0; i < rows; ++i)
        store_outputs(a, m + i, col, out + i * kRows, min64(kRows, l.n - col));
      m += rows;
    }
  }
}

}  // namespace
}  // namespace qtale::cpu

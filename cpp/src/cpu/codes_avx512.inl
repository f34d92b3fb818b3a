// What the kernels over 64-row panels share: how codes, scales and zero points are read, and how far ahead.
#pragma once

#include <immintrin.h>

#include "cpu/tiles_avx512.inl"
#include "cpu/unroll.h"

namespace qtale::cpu {
namespace {

constexpr int kVecs = 4;  // registers of 16 rows

QTALE_INLINE __m512i load_line(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
QTALE_INLINE __m512i broadcast4(const std::int8_t* p) {
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
  QTALE_INLINE static __m512i get(const std::uint8_t* w, int p) {
    return load_line(w + 64 * p);
  }
};
template <>
struct Codes<4> {
  static constexpr int kInputs = 8, kFields = 2, kBytes = 256, kOffset = 8;
  template <int Field>
  QTALE_INLINE static __m512i get(const std::uint8_t* w, int p) {
    const __m512i line = load_line(w + 64 * p);
    return _mm512_and_si512(Field ? _mm512_srli_epi32(line, 4) : line, _mm512_set1_epi8(15));
  }
};
template <>
struct Codes<2> {
  static constexpr int kInputs = 16, kFields = 4, kBytes = 256, kOffset = 2;
  template <int Field>
  QTALE_INLINE static __m512i get(const std::uint8_t* w, int p) {
    const __m512i line = load_line(w + 64 * p);
    return _mm512_and_si512(Field ? _mm512_srli_epi32(line, 2 * Field) : line, _mm512_set1_epi8(3));
  }
};
constexpr int kSelect = 0xd8;  // bits of the second operand where the third has ones, else of the first

template <>
struct Codes<3> {
  static constexpr int kInputs = 32, kFields = 8, kBytes = 768, kOffset = 4;
  template <int Field>
  QTALE_INLINE static __m512i get(const std::uint8_t* w, int p) {
    const __m512i seven = _mm512_set1_epi8(7);
    w += 64 * p;
    if constexpr (Field < 6) {
      const __m512i line = load_line(w + 256 * (Field / 2));
      return _mm512_and_si512(Field % 2 ? _mm512_srli_epi32(line, 3) : line, seven);
    } else {
      const __m512i low = _mm512_srli_epi32(load_line(w + 256 * (Field - 6)), 6);
      __m512i both = _mm512_srli_epi32(load_line(w + 512), Field - 2);
      both = _mm512_ternarylogic_epi32(both, low, _mm512_set1_epi8(3), kSelect);
      return _mm512_and_si512(both, seven);
    }
  }
};

// The scales of V registers of rows, of which the first is register `first` of the panel.
template <int V>
QTALE_INLINE void load_scales(__m512 (&out)[V], const std::uint8_t* p, DType dtype, int first = 0) {
  const auto* half = reinterpret_cast<const std::uint16_t*>(p) + 16 * first;
  if (dtype == DType::f16) {
    unroll<V>([&](auto v) QTALE_INLINE_LAMBDA { out[v] = load_f16(half + 16 * v); });
  } else if (dtype == DType::bf16) {
    unroll<V>([&](auto v) QTALE_INLINE_LAMBDA { out[v] = load_bf16(half + 16 * v); });
  } else {
    const auto* single = reinterpret_cast<const float*>(p) + 16 * first;
    unroll<V>([&](auto v) QTALE_INLINE_LAMBDA { out[v] = load_f32(single + 16 * v); });
  }
}

QTALE_INLINE __m512i load_zeros(const std::uint8_t* p, int v) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * v)));
}

// Asks for one field's part of the lines of a step: all at once would be more than the line buffers take. Where memory
// answers slowly these lines go to L2, and those that a tile of few rows reads soon from there to L1.
template <class C, int Field, int Rows>
QTALE_INLINE void prefetch_part_of_step(const std::uint8_t* w, const std::uint8_t*& ahead, std::int64_t pace) {
  constexpr int kLines = C::kBytes / 64, kFirst = kLines * Field / C::kFields;
  unroll<kLines*(Field + 1) / C::kFields - kFirst>([&](auto line) QTALE_INLINE_LAMBDA {
    _mm_prefetch(reinterpret_cast<const char*>(ahead), kNear > 0 ? _MM_HINT_T1 : _MM_HINT_T0);
    if constexpr (asks_twice(Rows))
      _mm_prefetch(reinterpret_cast<const char*>(w + 64 * (kFirst + line) + kNear), _MM_HINT_T0);
    ahead += pace;
  });
}

// Group 0 finds no earlier sums in the output.
QTALE_INLINE __mmask16 keep_of(std::int64_t group) { return static_cast<__mmask16>(group == 0 ? 0 : 0xffff); }

// (sum - (offset + zero point) * activation total) * scale, for matrices with one scale per row.
inline void finish_channel(const Layout& l, const std::uint8_t* panel, const float* totals, std::int64_t rows,
                           float* out) {
  const std::uint8_t* params = panel + l.param_offset(0);
  __m512 scale[kVecs];
  load_scales(scale, params, l.scale_dtype);
  for (int p = 0; p < kVecs; ++p) {
    __m512 offset = _mm512_set1_ps(static_cast<float>(1 << (l.num_bits - 1)));
    if (!l.symmetric) offset = _mm512_add_ps(offset, _mm512_cvtepi32_ps(load_zeros(params + l.scale_bytes, p)));
    for (std::int64_t m = 0; m < rows; ++m) {
      float* o = out + m * kRows + 16 * p;
      const __m512 sum = _mm512_fnmadd_ps(offset, _mm512_set1_ps(totals[m]), _mm512_load_ps(o));
      _mm512_store_ps(o, _mm512_mul_ps(sum, scale[p]));
    }
  }
}

}  // namespace
}  // namespace qtale::cpu

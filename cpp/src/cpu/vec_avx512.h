// Sixteen floats in one AVX-512 register. Internal linkage, as every file compiled for a newer CPU.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace qtale::cpu {
namespace {

constexpr int kWidth = 16;
using VecF = __m512;
using VecI = __m512i;

inline VecF load_f32(const float* p) { return _mm512_loadu_ps(p); }
inline VecF load_f16(const std::uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline VecF load_bf16(const std::uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline VecF load_s8(const std::int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// Stores of whole registers; with Stream past the caches, to aligned memory, and stream_fence() after the last one.
template <bool Stream>
inline void put(void* p, __m512i v) {
  Stream ? _mm512_stream_si512(static_cast<__m512i*>(p), v) : _mm512_storeu_si512(p, v);
}
template <bool Stream>
inline void put(void* p, __m256i v) {
  auto* to = static_cast<__m256i*>(p);
  Stream ? _mm256_stream_si256(to, v) : _mm256_storeu_si256(to, v);
}
inline void stream_fence() { _mm_sfence(); }

template <bool Stream = false>
inline void store_f32(float* p, VecF v) {
  put<Stream>(p, _mm512_castps_si512(v));
}
template <bool Stream = false>
inline void store_f16(std::uint16_t* p, VecF v) {
  put<Stream>(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
template <bool Stream = false>
inline void store_bf16(std::uint16_t* p, VecF v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i all = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
  put<Stream>(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16)));
}
// Lanes are in int8 range; they are rounded to nearest, ties to even.
inline void store_s8(std::int8_t* p, VecF v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
// Four registers of integers as bytes in [low, high], bounds that set1_s8 made.
template <bool Stream>
inline void store_s8x4(std::int8_t* p, VecI a, VecI b, VecI c, VecI d, VecI low, VecI high) {
  const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  const __m512i kept = _mm512_min_epi8(_mm512_max_epi8(bytes, low), high);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  put<Stream>(p, _mm512_permutexvar_epi32(order, kept));
}
inline VecI set1_s8(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
inline VecI to_int(VecF a) { return _mm512_cvtps_epi32(a); }
inline VecI add_int(VecI a, VecI b) { return _mm512_add_epi32(a, b); }

inline VecF set1(float x) { return _mm512_set1_ps(x); }
inline VecF add(VecF a, VecF b) { return _mm512_add_ps(a, b); }
inline VecF sub(VecF a, VecF b) { return _mm512_sub_ps(a, b); }
inline VecF mul(VecF a, VecF b) { return _mm512_mul_ps(a, b); }
// sum += a * b. Spelled out: g++ 12 chooses forms that overwrite a factor and then moves sums between registers.
inline void accumulate(VecF& sum, VecF a, VecF b) { asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
// a * b + c
inline VecF multiply_add(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
// One bit per lane that is not <= its peer: greater, or one of them NaN.
inline unsigned not_le(VecF a, VecF b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
inline VecF max(VecF a, VecF b) { return _mm512_max_ps(a, b); }
inline VecF min(VecF a, VecF b) { return _mm512_min_ps(a, b); }
inline VecF rint(VecF a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline VecI abs_bits(VecF a) { return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)); }
inline VecI zero_bits() { return _mm512_setzero_si512(); }
inline VecI max_bits(VecI a, VecI b) { return _mm512_max_epu32(a, b); }
inline VecF div(VecF a, VecF b) { return _mm512_div_ps(a, b); }
// a * 2^n where x >= -126, and 0 elsewhere; `biased` is 1.5 * 2^23 + 127 + n, so its last bits are the exponent of 2^n.
inline VecF scale_down(VecF a, VecF biased, VecF x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(biased), 23);
  return _mm512_maskz_mul_ps(normal, a, _mm512_castsi512_ps(power));
}
// Lanes outside of [begin, end) become `other`.
inline VecF keep_lanes(VecF a, int begin, int end, VecF other) {
  const unsigned kept = ((1u << end) - 1u) & ~((1u << begin) - 1u);
  return _mm512_mask_mov_ps(other, static_cast<__mmask16>(kept), a);
}
inline VecF negated_abs(VecF a) { return _mm512_or_ps(a, _mm512_set1_ps(-0.0f)); }
// a in lanes whose sign bit is set, else b.
inline VecF where_negative(VecF sign, VecF a, VecF b) {
  return _mm512_mask_mov_ps(b, _mm512_movepi32_mask(_mm512_castps_si512(sign)), a);
}
inline std::uint32_t reduce_max_bits(VecI a) { return _mm512_reduce_max_epu32(a); }
// The same of 16-bit floats as they are stored: their magnitudes order like unsigned integers.
constexpr int kWidth16 = 32;
inline VecI abs_bits16(const std::uint16_t* p) {
  return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi16(0x7fff));
}
inline VecI max_bits16(VecI a, VecI b) { return _mm512_max_epu16(a, b); }
inline std::uint32_t reduce_max_bits16(VecI a) {
  return reduce_max_bits(max_bits(_mm512_srli_epi32(a, 16), _mm512_and_si512(a, _mm512_set1_epi32(0xffff))));
}
// Halves are added to halves until one lane is left.
inline __m128 reduce_add4(VecF a, VecF b, VecF c, VecF d) {
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4e));
  all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xb1));
  return _mm512_castps512_ps128(
      _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12), all));
}
inline float reduce_add(VecF a) { return _mm_cvtss_f32(reduce_add4(a, a, a, a)); }
inline float reduce_max(VecF a) { return _mm512_reduce_max_ps(a); }
inline float reduce_min(VecF a) { return _mm512_reduce_min_ps(a); }

}  // namespace
}  // namespace qtale::cpu

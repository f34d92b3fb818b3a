// Eight floats in one AVX2 register (with FMA and F16C). Internal linkage, as every file compiled for a newer CPU.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace qtale::cpu {
namespace {

constexpr int kWidth = 8;
using VecF = __m256;
using VecI = __m256i;

inline VecF load_f32(const float* p) { return _mm256_loadu_ps(p); }
inline VecF load_f16(const std::uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline VecF load_bf16(const std::uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline VecF load_s8(const std::int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// Stores of whole registers; with Stream past the caches, to aligned memory, and stream_fence() after the last one.
template <bool Stream>
inline void put(void* p, __m256i v) {
  auto* to = static_cast<__m256i*>(p);
  Stream ? _mm256_stream_si256(to, v) : _mm256_storeu_si256(to, v);
}
template <bool Stream>
inline void put(void* p, __m128i v) {
  auto* to = static_cast<__m128i*>(p);
  Stream ? _mm_stream_si128(to, v) : _mm_storeu_si128(to, v);
}
inline void stream_fence() { _mm_sfence(); }

template <bool Stream = false>
inline void store_f32(float* p, VecF v) {
  put<Stream>(p, _mm256_castps_si256(v));
}
template <bool Stream = false>
inline void store_f16(std::uint16_t* p, VecF v) {
  put<Stream>(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline __m128i narrow_32_to_16(__m256i v) {
  return _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}
template <bool Stream = false>
inline void store_bf16(std::uint16_t* p, VecF v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  put<Stream>(p, narrow_32_to_16(_mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16)));
}
// Lanes are in int8 range; they are rounded to nearest, ties to even.
inline void store_s8(std::int8_t* p, VecF v) {
  const __m256i wide = _mm256_cvtps_epi32(v);
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
}
// Four registers of integers as bytes in [low, high], bounds that set1_s8 made.
template <bool Stream>
inline void store_s8x4(std::int8_t* p, VecI a, VecI b, VecI c, VecI d, VecI low, VecI high) {
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  const __m256i kept = _mm256_min_epi8(_mm256_max_epi8(bytes, low), high);
  put<Stream>(p, _mm256_permutevar8x32_epi32(kept, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}
inline VecI set1_s8(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
inline VecI to_int(VecF a) { return _mm256_cvtps_epi32(a); }
inline VecI add_int(VecI a, VecI b) { return _mm256_add_epi32(a, b); }

inline VecF set1(float x) { return _mm256_set1_ps(x); }
inline VecF add(VecF a, VecF b) { return _mm256_add_ps(a, b); }
inline VecF sub(VecF a, VecF b) { return _mm256_sub_ps(a, b); }
inline VecF mul(VecF a, VecF b) { return _mm256_mul_ps(a, b); }
// sum += a * b. Spelled out: g++ 12 chooses forms that overwrite a factor and then moves sums between registers.
inline void accumulate(VecF& sum, VecF a, VecF b) { asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b)); }
// a * b + c
inline VecF multiply_add(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
// One bit per lane that is not <= its peer: greater, or one of them NaN.
inline unsigned not_le(VecF a, VecF b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)));
}
inline VecF max(VecF a, VecF b) { return _mm256_max_ps(a, b); }
inline VecF min(VecF a, VecF b) { return _mm256_min_ps(a, b); }
inline VecF rint(VecF a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline VecI abs_bits(VecF a) { return _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff)); }
inline VecI zero_bits() { return _mm256_setzero_si256(); }
inline VecI max_bits(VecI a, VecI b) { return _mm256_max_epu32(a, b); }

inline VecF div(VecF a, VecF b) { return _mm256_div_ps(a, b); }
// a * 2^n where x >= -126, and 0 elsewhere; `biased` is 1.5 * 2^23 + 127 + n, so its last bits are the exponent of 2^n.
inline VecF scale_down(VecF a, VecF biased, VecF x) {
  const __m256 normal = _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(biased), 23);
  return _mm256_and_ps(normal, _mm256_mul_ps(a, _mm256_castsi256_ps(power)));
}
// Lanes outside of [begin, end) become `other`.
inline VecF keep_lanes(VecF a, int begin, int end, VecF other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i early = _mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane);
  const __m256i kept = _mm256_andnot_si256(early, _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
  return _mm256_blendv_ps(other, a, _mm256_castsi256_ps(kept));
}
inline VecF negated_abs(VecF a) { return _mm256_or_ps(a, _mm256_set1_ps(-0.0f)); }
// a in lanes whose sign bit is set, else b.
inline VecF where_negative(VecF sign, VecF a, VecF b) { return _mm256_blendv_ps(b, a, sign); }

inline std::uint32_t reduce_max_bits(VecI a) {
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
  return static_cast<std::uint32_t>(_mm_cvtsi128_si32(m));
}
// The same of 16-bit floats as they are stored: their magnitudes order like unsigned integers.
constexpr int kWidth16 = 16;
inline VecI abs_bits16(const std::uint16_t* p) {
  return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi16(0x7fff));
}
inline VecI max_bits16(VecI a, VecI b) { return _mm256_max_epu16(a, b); }
inline std::uint32_t reduce_max_bits16(VecI a) {
  return reduce_max_bits(max_bits(_mm256_srli_epi32(a, 16), _mm256_and_si256(a, _mm256_set1_epi32(0xffff))));
}
// Halves are added to halves until one lane is left.
inline __m128 reduce_add4(VecF a, VecF b, VecF c, VecF d) {
  const __m256 ac = _mm256_add_ps(_mm256_permute2f128_ps(a, c, 0x20), _mm256_permute2f128_ps(a, c, 0x31));
  const __m256 bd = _mm256_add_ps(_mm256_permute2f128_ps(b, d, 0x20), _mm256_permute2f128_ps(b, d, 0x31));
  const __m256 pairs = _mm256_add_ps(_mm256_shuffle_ps(ac, bd, 0x44), _mm256_shuffle_ps(ac, bd, 0xee));
  const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(pairs, pairs, 0x88), _mm256_shuffle_ps(pairs, pairs, 0xdd));
  return _mm_shuffle_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1), 0x44);
}
inline float reduce_add(VecF a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float reduce_max(VecF a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline float reduce_min(VecF a) {
  __m128 m = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_min_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
}

}  // namespace
}  // namespace qtale::cpu

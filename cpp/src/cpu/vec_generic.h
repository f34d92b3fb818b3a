// Eight floats in plain C++: what compilers turn into NEON or SSE2, and the lanes of the generic tier.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "core/half.h"
#include "cpu/quad.h"

namespace qtale::cpu {
namespace {

constexpr int kWidth = 8;

struct VecF {
  float lane[kWidth];
};
struct VecI {
  std::uint32_t lane[kWidth];
};

template <class Fn>
inline VecF map_lanes(Fn&& fn) {
  VecF out;
  for (int i = 0; i < kWidth; ++i) out.lane[i] = fn(i);
  return out;
}

inline VecF load_f32(const float* p) {
  return map_lanes([&](int i) { return p[i]; });
}
inline VecF load_f16(const std::uint16_t* p) {
  return map_lanes([&](int i) { return f16_to_float(p[i]); });
}
inline VecF load_bf16(const std::uint16_t* p) {
  return map_lanes([&](int i) { return bf16_to_float(p[i]); });
}
inline VecF load_s8(const std::int8_t* p) {
  return map_lanes([&](int i) { return static_cast<float>(p[i]); });
}
// `Stream` asks for stores past the caches, which plain C++ does not have.
inline void stream_fence() {}

template <bool Stream = false>
inline void store_f32(float* p, VecF v) {
  for (int i = 0; i < kWidth; ++i) p[i] = v.lane[i];
}
template <bool Stream = false>
inline void store_f16(std::uint16_t* p, VecF v) {
  for (int i = 0; i < kWidth; ++i) p[i] = float_to_f16(v.lane[i]);
}
template <bool Stream = false>
inline void store_bf16(std::uint16_t* p, VecF v) {
  for (int i = 0; i < kWidth; ++i) p[i] = float_to_bf16(v.lane[i]);
}
// Lanes are in int8 range; they are rounded to nearest, ties to even.
inline void store_s8(std::int8_t* p, VecF v) {
  for (int i = 0; i < kWidth; ++i) p[i] = static_cast<std::int8_t>(std::nearbyintf(v.lane[i]));
}
// Four registers of integers as bytes in [low, high], bounds that set1_s8 made.
template <bool Stream>
inline void store_s8x4(std::int8_t* p, const VecI& a, const VecI& b, const VecI& c, const VecI& d, const VecI& low,
                       const VecI& high) {
  const auto least = static_cast<std::int32_t>(low.lane[0]), most = static_cast<std::int32_t>(high.lane[0]);
  for (const VecI* part : {&a, &b, &c, &d}) {
    for (int i = 0; i < kWidth; ++i) {
      const auto value = static_cast<std::int32_t>(part->lane[i]);
      *p++ = static_cast<std::int8_t>(value < least ? least : value > most ? most : value);
    }
  }
}
inline VecI set1_s8(int x) {
  VecI out;
  for (std::uint32_t& lane : out.lane) lane = static_cast<std::uint32_t>(x);
  return out;
}
inline VecI to_int(const VecF& a) {
  VecI out;
  for (int i = 0; i < kWidth; ++i)
    out.lane[i] = static_cast<std::uint32_t>(static_cast<std::int32_t>(std::nearbyintf(a.lane[i])));
  return out;
}
inline VecI add_int(VecI a, const VecI& b) {
  for (int i = 0; i < kWidth; ++i) a.lane[i] += b.lane[i];
  return a;
}

inline VecF set1(float x) {
  return map_lanes([&](int) { return x; });
}
inline VecF add(VecF a, VecF b) {
  return map_lanes([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline VecF sub(VecF a, VecF b) {
  return map_lanes([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline VecF mul(VecF a, VecF b) {
  return map_lanes([&](int i) { return a.lane[i] * b.lane[i]; });
}
// sum += a * b
inline void accumulate(VecF& sum, const VecF& a, const VecF& b) {
  for (int i = 0; i < kWidth; ++i) sum.lane[i] += a.lane[i] * b.lane[i];
}
// a * b + c
inline VecF multiply_add(const VecF& a, const VecF& b, const VecF& c) {
  return map_lanes([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
// One bit per lane that is not <= its peer: greater, or one of them NaN.
inline unsigned not_le(const VecF& a, const VecF& b) {
  unsigned bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= static_cast<unsigned>(!(a.lane[i] <= b.lane[i])) << i;
  return bits;
}
// As on x86: the second operand where the comparison is false, so max(lo, NaN) is NaN.
inline VecF max(VecF a, VecF b) {
  return map_lanes([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline VecF min(VecF a, VecF b) {
  return map_lanes([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline VecF rint(VecF a) {
  return map_lanes([&](int i) { return std::nearbyintf(a.lane[i]); });
}
inline VecF div(const VecF& a, const VecF& b) {
  return map_lanes([&](int i) { return a.lane[i] / b.lane[i]; });
}
// a * 2^n where x >= -126, and 0 elsewhere; `biased` is 1.5 * 2^23 + 127 + n, so its last bits are the exponent of 2^n.
inline VecF scale_down(const VecF& a, const VecF& biased, const VecF& x) {
  return map_lanes([&](int i) {
    const float power = std::bit_cast<float>(std::bit_cast<std::uint32_t>(biased.lane[i]) << 23);
    return x.lane[i] < -126.0f ? 0.0f : a.lane[i] * power;
  });
}
// Lanes outside of [begin, end) become `other`.
inline VecF keep_lanes(const VecF& a, int begin, int end, const VecF& other) {
  return map_lanes([&](int i) { return i >= begin && i < end ? a.lane[i] : other.lane[i]; });
}
inline VecF negated_abs(const VecF& a) {
  return map_lanes([&](int i) { return -std::fabs(a.lane[i]); });
}
// a in lanes whose sign bit is set, else b.
inline VecF where_negative(const VecF& sign, const VecF& a, const VecF& b) {
  return map_lanes([&](int i) { return std::signbit(sign.lane[i]) ? a.lane[i] : b.lane[i]; });
}
inline VecI abs_bits(VecF a) {
  VecI out;
  for (int i = 0; i < kWidth; ++i) out.lane[i] = std::bit_cast<std::uint32_t>(a.lane[i]) & 0x7fffffffu;
  return out;
}
inline VecI zero_bits() { return VecI{}; }
inline VecI max_bits(VecI a, VecI b) {
  VecI out;
  for (int i = 0; i < kWidth; ++i) out.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return out;
}
inline std::uint32_t reduce_max_bits(VecI a) {
  std::uint32_t best = 0;
  for (const std::uint32_t lane : a.lane) best = lane > best ? lane : best;
  return best;
}
// The same of 16-bit floats as they are stored: their magnitudes order like unsigned integers.
constexpr int kWidth16 = kWidth;
inline VecI abs_bits16(const std::uint16_t* p) {
  VecI out;
  for (int i = 0; i < kWidth; ++i) out.lane[i] = p[i] & 0x7fffu;
  return out;
}
inline VecI max_bits16(VecI a, VecI b) { return max_bits(a, b); }
inline std::uint32_t reduce_max_bits16(VecI a) { return reduce_max_bits(a); }
// Halves are added to halves, as on x86.
inline float reduce_add(VecF a) {
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.lane[i] += a.lane[i + half];
  return a.lane[0];
}
inline Quad reduce_add4(const VecF& a, const VecF& b, const VecF& c, const VecF& d) {
  return Quad{reduce_add(a), reduce_add(b), reduce_add(c), reduce_add(d)};
}
inline float reduce_max(VecF a) {
  float best = a.lane[0];
  for (const float lane : a.lane) best = lane > best ? lane : best;
  return best;
}
inline float reduce_min(VecF a) {
  float best = a.lane[0];
  for (const float lane : a.lane) best = lane < best ? lane : best;
  return best;
}

}  // namespace
}  // namespace qtale::cpu

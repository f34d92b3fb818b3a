// A lane of 32 bits: what the kernels of project.inl multiply and sum at once. They move lanes as floats do, whatever
// these hold.
#pragma once

#include "cpu/elements.inl"
#include "cpu/unroll.h"

namespace qtale::cpu::projection {
namespace {

// One number in float32.
struct SingleLane {
  static constexpr std::int64_t kNumbers = 1;
  template <class E>
  QTALE_INLINE static VecF load(const typename E::T* p) {
    return E::load(p);
  }
  QTALE_INLINE static void accumulate(VecF& sum, VecF a, VecF b) { cpu::accumulate(sum, a, b); }
};

// A vector of lanes of which only `lanes` are there; the others are zero.
template <class Lane, class E>
VecF load_lanes(const typename E::T* p, std::int64_t lanes) {
  typename E::T buffer[kWidth * Lane::kNumbers] = {};
  if (lanes > 0) std::memcpy(buffer, p, static_cast<std::size_t>(lanes * Lane::kNumbers) * sizeof(typename E::T));
  return Lane::template load<E>(buffer);
}

// The lanes of consecutive numbers, with zeros up to whole vectors, which are `apart` floats from each other.
template <class Lane, class E>
void make_lanes(const typename E::T* from, std::int64_t lanes, float* to, std::int64_t apart = kWidth) {
  for (std::int64_t i = 0; i < lanes; i += kWidth, from += kWidth * Lane::kNumbers, to += apart)
    store_f32(to, i + kWidth <= lanes ? Lane::template load<E>(from) : load_lanes<Lane, E>(from, lanes - i));
}

}  // namespace
}  // namespace qtale::cpu::projection

// The rows that routed execution takes out and puts back, over the Vec of the including file's instruction set.
#pragma once

#include "cpu/elements.inl"
#include "cpu/kernels.h"

namespace qtale::cpu {
namespace {

void compact(const CompactArgs& a, std::int64_t begin, std::int64_t end) {
  with_type(a.x.dtype, [&](auto element) {
    using E = decltype(element);
    for (std::int64_t r = begin; r < end; ++r) {
      const auto* from = static_cast<const typename E::T*>(a.x.data) + a.indices[r] * a.x.stride;
      float* to = a.out + r * a.stride;
      std::int64_t i = 0;
      for (; i + kWidth <= a.size; i += kWidth) store_f32(to + i, E::load(from + i));
      if (i < a.size) store_part<F32>(to + i, load_part<E>(from + i, a.size - i), a.size - i);
    }
  });
}

void scatter_add(const ScatterArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    const VecF gate = set1(a.gates == nullptr ? 1.0f : a.gates[r]);
    const float* from = a.delta + r * a.delta_stride;
    float* to = a.x + a.indices[r] * a.stride;
    std::int64_t i = 0;
    for (; i + kWidth <= a.size; i += kWidth) store_f32(to + i, add(load_f32(to + i), mul(gate, load_f32(from + i))));
    if (i < a.size) {
      const std::int64_t rest = a.size - i;
      const VecF old = load_part<F32>(to + i, rest);
      store_part<F32>(to + i, add(old, mul(gate, load_part<F32>(from + i, rest))), rest);
    }
  }
}

}  // namespace
}  // namespace qtale::cpu

// rms_norm, rope, silu_mul and kv_append over the Vec of the including file's instruction set.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/decoder.h"
#include "cpu/elements.inl"
#include "cpu/exp.inl"
#include "cpu/kv_entries.inl"

namespace qtale::cpu {
namespace {

// Calls fn(i, load, store) for the vectors of n floats; the last ones of fewer lanes go through a buffer.
template <class Fn>
inline void for_vectors(std::int64_t n, Fn&& fn) {
  const auto load = [](const float* p) { return load_f32(p); };
  const auto store = [](float* p, VecF v) { store_f32(p, v); };
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) fn(i, load, store);
  if (i == n) return;
  fn(
      i, [&](const float* p) { return load_part<F32>(p, n - i); },
      [&](float* p, VecF v) { store_part<F32>(p, v, n - i); });
}

inline float sum_of_squares(const float* x, std::int64_t n) {
  VecF sums[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  std::int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (int p = 0; p < 4; ++p) {
      const VecF v = load_f32(x + i + p * kWidth);
      accumulate(sums[p], v, v);
    }
  }
  for_vectors(n - i, [&](std::int64_t at, auto load, auto) {
    const VecF v = load(x + i + at);
    accumulate(sums[0], v, v);
  });
  return reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

void rms_norm_rows(const NormArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    for (std::int64_t h = 0; h < a.heads; ++h) {
      const float* x = a.x.at(r, h);
      float* out = a.out.at(r, h);
      const VecF factor = set1(1.0f / std::sqrt(sum_of_squares(x, a.n) / static_cast<float>(a.n) + a.eps));
      for_vectors(a.n, [&](std::int64_t i, auto load, auto store) {
        store(out + i, mul(mul(load(x + i), factor), load(a.weight + i)));
      });
    }
  }
}

void rope_rows(const RopeArgs& a, std::int64_t begin, std::int64_t end) {
  const VecF zero = set1(0.0f);
  for (std::int64_t r = begin; r < end; ++r) {
    const float* cosines = a.table + a.positions[r] * a.table_stride;
    const float* sines = cosines + a.half;
    for (std::int64_t h = 0; h < a.heads; ++h) {
      float* low = a.x.at(r, h);
      float* high = low + a.half;
      for_vectors(a.half, [&](std::int64_t i, auto load, auto store) {
        const VecF x = load(low + i), y = load(high + i), cosine = load(cosines + i), sine = load(sines + i);
        VecF first = mul(x, cosine), second = mul(y, cosine);
        accumulate(first, sub(zero, y), sine);
        accumulate(second, x, sine);
        store(low + i, first);
        store(high + i, second);
      });
    }
  }
}

void silu_mul_rows(const SiluArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    const float* gate = a.gate_up + r * a.in_stride;
    const float* up = gate + a.n;
    float* out = a.out + r * a.out_stride;
    for_vectors(
        a.n, [&](std::int64_t i, auto load, auto store) { store(out + i, mul(silu(load(gate + i)), load(up + i))); });
  }
}

// Sums of a block are float32, their total is double.
ExpSum exp_sum_of(const float* x, std::int64_t n) {
  constexpr std::int64_t kBlock = 4096;
  VecF largest = set1(-std::numeric_limits<float>::infinity());
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) largest = max(largest, load_f32(x + i));
  float top = reduce_max(largest);
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  const VecF offset = set1(top);
  double sum = 0.0;
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const std::int64_t whole = min64(kBlock, n - begin) / kWidth * kWidth;
    VecF total = set1(0.0f);
    for (std::int64_t at = begin; at < begin + whole; at += kWidth)
      total = add(total, exp_down(sub(load_f32(x + at), offset)));
    sum += static_cast<double>(reduce_add(total));
    for (std::int64_t at = begin + whole; at < min64(begin + kBlock, n); ++at)
      sum += static_cast<double>(std::exp(x[at] - top));
  }
  return {top, sum};
}

// Keys of one vector of dimensions lie a page apart from each other: they are rounded together and stored one by one.
template <class E>
void append_row(const float* k, const float* v, std::int64_t head_dim, typename E::T* keys, typename E::T* values) {
  typename E::T rounded[kWidth];
  for_vectors(head_dim, [&](std::int64_t d, auto load, auto) {
    const std::int64_t count = min64(kWidth, head_dim - d);
    E::store(rounded, load(k + d));
    for (std::int64_t i = 0; i < count; ++i) keys[(d + i) * kPageTokens] = rounded[i];
    if (count == kWidth) {
      E::store(values + d, load(v + d));
    } else {
      store_part<E>(values + d, load(v + d), count);
    }
  });
}

template <class E>
void append_typed(const AppendArgs& a, std::int64_t begin, std::int64_t end) {
  for_entries(a, begin, end, [&](std::byte* part, std::int64_t slot, std::int64_t row, std::int64_t head) {
    auto* keys = reinterpret_cast<typename E::T*>(part);
    append_row<E>(a.k.at(row, head), a.v.at(row, head), a.head_dim, keys + slot,
                  keys + (kPageTokens + slot) * a.head_dim);
  });
}

void append_units(const AppendArgs& a, std::int64_t begin, std::int64_t end) {
  if (a.dtype == DType::f16) return append_typed<F16>(a, begin, end);
  append_typed<F32>(a, begin, end);
}

}  // namespace
}  // namespace qtale::cpu

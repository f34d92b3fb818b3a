// quantize, dequantize and fake_quantize, written once over the Vec of the including file's instruction set.
// The arithmetic is that of reference.cpp, operation by operation, so results are equal bit for bit.
#pragma once

#include <cfloat>
#include <cstring>

#include "core/half.h"
#include "cpu/kernels.h"

namespace qtale::cpu {
namespace {

inline std::int64_t min64(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Typed access to whole vectors and, through a zero-filled buffer, to the rest of a row.
struct F32 {
  using T = float;
  static VecF load(const T* p) { return load_f32(p); }
  static void store(T* p, VecF v) { store_f32(p, v); }
};
struct F16 {
  using T = std::uint16_t;
  static VecF load(const T* p) { return load_f16(p); }
  static void store(T* p, VecF v) { store_f16(p, v); }
};
struct Bf16 {
  using T = std::uint16_t;
  static VecF load(const T* p) { return load_bf16(p); }
  static void store(T* p, VecF v) { store_bf16(p, v); }
};

template <class E>
inline VecF load_part(const typename E::T* p, std::int64_t count) {
  typename E::T buffer[kWidth] = {};
  std::memcpy(buffer, p, static_cast<std::size_t>(count) * sizeof(typename E::T));
  return E::load(buffer);
}
template <class E>
inline void store_part(typename E::T* p, VecF v, std::int64_t count) {
  typename E::T buffer[kWidth];
  E::store(buffer, v);
  std::memcpy(p, buffer, static_cast<std::size_t>(count) * sizeof(typename E::T));
}
inline VecF load_codes_part(const std::int8_t* p, std::int64_t count) {
  std::int8_t buffer[kWidth] = {};
  std::memcpy(buffer, p, static_cast<std::size_t>(count));
  return load_s8(buffer);
}
inline void store_codes_part(std::int8_t* p, VecF v, std::int64_t count) {
  std::int8_t buffer[kWidth];
  store_s8(buffer, v);
  std::memcpy(p, buffer, static_cast<std::size_t>(count));
}

// Calls fn with the element type of a float dtype.
template <class Fn>
inline auto with_type(DType dtype, Fn&& fn) {
  if (dtype == DType::f16) return fn(F16{});
  if (dtype == DType::bf16) return fn(Bf16{});
  return fn(F32{});
}

inline float load_scalar(const void* p, DType dtype, std::int64_t i) {
  if (dtype == DType::f16) return f16_to_float(static_cast<const std::uint16_t*>(p)[i]);
  if (dtype == DType::bf16) return bf16_to_float(static_cast<const std::uint16_t*>(p)[i]);
  return static_cast<const float*>(p)[i];
}

// Stores a scale and returns it as stored.
inline float store_scale(void* p, DType dtype, std::int64_t i, float scale) {
  const float tiny = dtype == DType::f16 ? 0x1p-10f : dtype == DType::bf16 ? 0x1p-7f : FLT_EPSILON;
  if (dtype == DType::f32) {
    const float kept = scale < FLT_MIN ? tiny : scale;
    static_cast<float*>(p)[i] = kept;
    return kept;
  }
  const bool half = dtype == DType::f16;
  std::uint16_t bits = half ? float_to_f16(scale) : float_to_bf16(scale);
  float kept = half ? f16_to_float(bits) : bf16_to_float(bits);
  if (kept < FLT_MIN) {  // a scale that rounds to nothing: its whole group is coded as zeros
    bits = half ? float_to_f16(tiny) : float_to_bf16(tiny);
    kept = tiny;
  }
  static_cast<std::uint16_t*>(p)[i] = bits;
  return kept;
}

struct Range {
  float lo, hi, amax;
};

template <class E>
inline Range find_range(const typename E::T* p, std::int64_t count) {
  VecI magnitude = zero_bits();
  VecF lo = set1(0.0f), hi = set1(0.0f);
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const VecF v = E::load(p + i);
    magnitude = max_bits(magnitude, abs_bits(v));
    lo = min(v, lo);
    hi = max(v, hi);
  }
  if (i < count) {
    const VecF v = load_part<E>(p + i, count - i);
    magnitude = max_bits(magnitude, abs_bits(v));
    lo = min(v, lo);
    hi = max(v, hi);
  }
  const std::uint32_t bits = reduce_max_bits(magnitude);
  float amax;
  std::memcpy(&amax, &bits, sizeof amax);
  return {reduce_min(lo), reduce_max(hi), amax};
}

struct Coder {
  VecF inverse, zero, low, high;
  VecF code(VecF v) const { return min(high, max(low, add(rint(mul(v, inverse)), zero))); }
};

inline Coder make_coder(float scale, float zero_point, int num_bits) {
  const float half = static_cast<float>(1 << (num_bits - 1));
  return {set1(1.0f / scale), set1(zero_point), set1(-half), set1(half - 1.0f)};
}

inline float pick_zero_point(float lo, float scale, int num_bits) {
  const float half = static_cast<float>(1 << (num_bits - 1));
  alignas(64) float lanes[kWidth];
  store_f32(lanes, rint(set1(-half - lo * (1.0f / scale))));
  return lanes[0] < -half ? -half : lanes[0] > half - 1.0f ? half - 1.0f : lanes[0];
}

template <class E>
inline bool quantize_group(const QuantizeArgs& a, const typename E::T* p, std::int64_t count, std::int8_t* codes,
                           std::int64_t at) {
  const Range range = find_range<E>(p, count);
  if (!(range.amax <= FLT_MAX)) return false;
  const float levels = static_cast<float>((1 << a.num_bits) - 1);
  const bool symmetric = a.zero_point == nullptr;
  const float wanted = symmetric ? range.amax / (levels * 0.5f) : (range.hi - range.lo) / levels;
  const float scale = store_scale(a.scale, a.scale_dtype, at, wanted);
  if (!(scale <= FLT_MAX)) return false;
  float zero_point = 0.0f;
  if (!symmetric) {
    zero_point = pick_zero_point(range.lo, scale, a.num_bits);
    a.zero_point[at] = static_cast<std::int8_t>(zero_point);
  }
  const Coder coder = make_coder(scale, zero_point, a.num_bits);
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store_s8(codes + i, coder.code(E::load(p + i)));
  if (i < count) store_codes_part(codes + i, coder.code(load_part<E>(p + i, count - i)), count - i);
  return true;
}

std::int64_t quantize_rows(const QuantizeArgs& a, std::int64_t begin, std::int64_t end) {
  return with_type(a.weight.dtype, [&](auto element) -> std::int64_t {
    using E = decltype(element);
    for (std::int64_t r = begin; r < end; ++r) {
      const auto* row = static_cast<const typename E::T*>(a.weight.data) + r * a.weight.stride;
      std::int8_t* codes = a.codes + r * a.in_features;
      for (std::int64_t g = 0; g < a.groups; ++g) {
        const std::int64_t k = g * a.group_size;
        if (!quantize_group<E>(a, row + k, a.group_size, codes + k, r * a.groups + g)) return r;
      }
    }
    return -1;
  });
}

void dequantize_rows(const DequantizeArgs& a, std::int64_t begin, std::int64_t end) {
  with_type(a.out.dtype, [&](auto element) {
    using E = decltype(element);
    for (std::int64_t r = begin; r < end; ++r) {
      auto* row = static_cast<typename E::T*>(a.out.data) + r * a.out.stride;
      const std::int8_t* codes = a.codes + r * a.in_features;
      for (std::int64_t g = 0; g < a.groups; ++g) {
        const std::int64_t at = r * a.groups + g;
        const VecF scale = set1(load_scalar(a.scale, a.scale_dtype, at));
        const VecF zero = set1(a.zero_point ? static_cast<float>(a.zero_point[at]) : 0.0f);
        std::int64_t k = g * a.group_size;
        const std::int64_t stop = k + a.group_size;
        for (; k + kWidth <= stop; k += kWidth) E::store(row + k, mul(sub(load_s8(codes + k), zero), scale));
        if (k < stop) store_part<E>(row + k, mul(sub(load_codes_part(codes + k, stop - k), zero), scale), stop - k);
      }
    }
  });
}

void fake_quantize_rows(const FakeQuantizeArgs& a, std::int64_t begin, std::int64_t end) {
  with_type(a.x.dtype, [&](auto element) {
    using E = decltype(element);
    for (std::int64_t r = begin; r < end; ++r) {
      const auto* in = static_cast<const typename E::T*>(a.x.data) + r * a.x.stride;
      auto* out = static_cast<typename E::T*>(a.out.data) + r * a.out.stride;
      for (std::int64_t g = 0; g < a.groups; ++g) {
        const std::int64_t at = r * a.groups + g;
        const float scale = load_scalar(a.scale, a.scale_dtype, at);
        const float zero_point = a.zero_point ? static_cast<float>(a.zero_point[at]) : 0.0f;
        const Coder coder = make_coder(scale, zero_point, a.num_bits);
        const VecF step = set1(scale);
        std::int64_t k = g * a.group_size;
        const std::int64_t stop = k + a.group_size;
        for (; k + kWidth <= stop; k += kWidth)
          E::store(out + k, mul(sub(coder.code(E::load(in + k)), coder.zero), step));
        if (k < stop)
          store_part<E>(out + k, mul(sub(coder.code(load_part<E>(in + k, stop - k)), coder.zero), step), stop - k);
      }
    }
  });
}

}  // namespace
}  // namespace qtale::cpu

// quantize, dequantize and fake_quantize, written once over the Vec of the including file's instruction set.
// The arithmetic is that of reference.cpp, operation by operation, so results are equal bit for bit.
#pragma once

#include <cfloat>
#include <cstring>
#include <type_traits>

#include "cpu/elements.inl"
#include "cpu/kernels.h"

namespace qtale::cpu {
namespace {

// Outputs of at least this many bytes at once leave no cache for anybody: they are written past the caches.
constexpr std::int64_t kStreamBytes = std::int64_t{1} << 20;

// Whether `rows` rows of `row_bytes` at p can be streamed; whole lines only.
inline bool can_stream(const void* p, std::int64_t row_bytes, std::int64_t rows) {
  return rows * row_bytes >= kStreamBytes && row_bytes % 64 == 0 && reinterpret_cast<std::uintptr_t>(p) % 64 == 0;
}

// Bytes ahead of the first pass over a weight that are asked for: hardware alone reads one stream too late.
constexpr std::int64_t kReadAhead = 8192;

inline void read_ahead(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + kReadAhead); }

inline float float_of_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The largest magnitude; NaN and inf show as bits above those of FLT_MAX.
inline float find_magnitude(F32, const float* p, std::int64_t count) {
  VecI magnitude = zero_bits();
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    read_ahead(p + i);
    magnitude = max_bits(magnitude, abs_bits(load_f32(p + i)));
  }
  if (i < count) magnitude = max_bits(magnitude, abs_bits(load_part<F32>(p + i, count - i)));
  return float_of_bits(reduce_max_bits(magnitude));
}
template <class E>
inline float find_magnitude(E, const std::uint16_t* p, std::int64_t count) {
  VecI magnitude = zero_bits();
  std::int64_t i = 0;
  for (; i + kWidth16 <= count; i += kWidth16) {
    read_ahead(p + i);
    magnitude = max_bits16(magnitude, abs_bits16(p + i));
  }
  if (i < count) {
    std::uint16_t rest[kWidth16] = {};
    std::memcpy(rest, p + i, static_cast<std::size_t>(count - i) * sizeof *p);
    magnitude = max_bits16(magnitude, abs_bits16(rest));
  }
  const std::uint32_t bits = reduce_max_bits16(magnitude);
  return std::is_same_v<E, F16> ? f16_to_float(static_cast<std::uint16_t>(bits)) : float_of_bits(bits << 16);
}

struct Range {
  float lo, hi;
};

template <class E>
inline Range find_range(const typename E::T* p, std::int64_t count) {
  VecF lo = set1(0.0f), hi = set1(0.0f);
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const VecF v = E::load(p + i);
    lo = min(v, lo);
    hi = max(v, hi);
  }
  if (i < count) {
    const VecF v = load_part<E>(p + i, count - i);
    lo = min(v, lo);
    hi = max(v, hi);
  }
  return {reduce_min(lo), reduce_max(hi)};
}

// Parameters of neighbouring groups, whose divisions and conversions are done together.
struct Params {
  std::int64_t first = 0, count = 0;  // groups, counted through all rows
  alignas(64) float lo[kWidth] = {};
  alignas(64) float wanted[kWidth] = {};  // largest magnitude or width of the range, then the scale asked for
  alignas(64) float scale[kWidth];        // as stored
  alignas(64) float inverse[kWidth];
  alignas(64) float zero_point[kWidth] = {};
};

// Walks through the groups of a weight whose rows need not be adjacent.
template <class E>
struct Cursor {
  const typename E::T* p;
  std::int64_t left;  // groups of the row from here on

  Cursor(const QuantizeArgs& a, std::int64_t row)
      : p(static_cast<const typename E::T*>(a.weight.data) + row * a.weight.stride), left(a.groups) {}

  const typename E::T* take(const QuantizeArgs& a) {
    const typename E::T* group = p;
    p += a.group_size;
    if (--left == 0) {
      p += a.weight.stride - a.in_features;
      left = a.groups;
    }
    return group;
  }
};

template <class E, bool Symmetric>
inline bool measure_group(const typename E::T* p, std::int64_t count, Params& params, std::int64_t i) {
  const float magnitude = find_magnitude(E{}, p, count);
  params.wanted[i] = magnitude;
  if constexpr (!Symmetric) {
    const Range range = find_range<E>(p, count);
    params.lo[i] = range.lo;
    params.wanted[i] = range.hi - range.lo;
  }
  return magnitude <= FLT_MAX;
}

// Rounds the scales to their dtype, stores those that are in use and keeps all as stored.
template <class E>
inline void store_scales(Params& params, void* scale, float tiny) {
  typename E::T stored[kWidth];
  E::store(stored, load_f32(params.wanted));
  store_f32(params.scale, E::load(stored));
  // A scale that rounds to nothing: its whole group is coded as zeros.
  for (float& s : params.scale) s = s < FLT_MIN ? tiny : s;
  store_part<E>(static_cast<typename E::T*>(scale) + params.first, load_f32(params.scale), params.count);
}

// The first group whose scale overflows its dtype, or -1.
template <bool Symmetric>
inline std::int64_t choose_params(const QuantizeArgs& a, Params& params) {
  const float levels = static_cast<float>((1 << a.num_bits) - 1), half = static_cast<float>(1 << (a.num_bits - 1));
  const float divisor = Symmetric ? levels * 0.5f : levels;
  for (float& w : params.wanted) w = w / divisor;
  with_type(a.scale_dtype, [&](auto element) {
    const float tiny = a.scale_dtype == DType::f16 ? 0x1p-10f : a.scale_dtype == DType::bf16 ? 0x1p-7f : FLT_EPSILON;
    store_scales<decltype(element)>(params, a.scale, tiny);
  });
  for (int i = 0; i < kWidth; ++i) params.inverse[i] = 1.0f / params.scale[i];
  if constexpr (!Symmetric) {
    const VecF ideal = rint(sub(set1(-half), mul(load_f32(params.lo), load_f32(params.inverse))));
    const VecF zero_point = min(max(ideal, set1(-half)), set1(half - 1.0f));
    store_f32(params.zero_point, zero_point);
    store_codes_part(a.zero_point + params.first, zero_point, params.count);
  }
  if (reduce_max(load_f32(params.scale)) <= FLT_MAX) return -1;
  std::int64_t i = 0;
  while (params.scale[i] <= FLT_MAX) ++i;
  return params.first + i;
}

struct Coder {
  VecF inverse, zero, low, high;

  Coder(float inverse_scale, float zero_point, int num_bits)
      : inverse(set1(inverse_scale)),
        zero(set1(zero_point)),
        low(set1(-static_cast<float>(1 << (num_bits - 1)))),
        high(set1(static_cast<float>(1 << (num_bits - 1)) - 1.0f)) {}

  VecF code(VecF v) const { return min(high, max(low, add(rint(mul(v, inverse)), zero))); }
  // The same without zero point, but for the rounding, which store_s8 does.
  VecF unrounded(VecF v) const { return min(high, max(low, mul(v, inverse))); }
};

template <class E, bool Symmetric, bool Stream>
inline void code_group(const Coder& coder, const typename E::T* p, std::int64_t count, std::int8_t* codes) {
  const auto code = [&](VecF v) { return Symmetric ? coder.unrounded(v) : coder.code(v); };
  const auto at = [&](std::int64_t i) { return code(E::load(p + i)); };
  std::int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth)
    store_s8x4<Stream>(codes + i, at(i), at(i + kWidth), at(i + 2 * kWidth), at(i + 3 * kWidth));
  for (; i + kWidth <= count; i += kWidth) store_s8(codes + i, at(i));
  if (i < count) store_codes_part(codes + i, code(load_part<E>(p + i, count - i)), count - i);
}

// Inputs of one batch of groups: small enough to be still in the first cache when they are coded.
constexpr std::int64_t kBatchInputs = 2048;

// While one batch is coded the next one is measured, so that memory is read all the time.
template <class E, bool Symmetric, bool Stream>
std::int64_t quantize_groups(const QuantizeArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t fitting = kBatchInputs / (a.group_size + 1) + 1, batch = min64(fitting, kWidth);
  Params params[2];
  Params *now = &params[0], *next = &params[1];
  Cursor<E> measuring(a, begin), coding(a, begin);
  next->first = begin * a.groups;
  do {
    next->count = min64(batch, end * a.groups - next->first);
    for (std::int64_t i = 0; i < batch; ++i) {
      if (i < next->count && !measure_group<E, Symmetric>(measuring.take(a), a.group_size, *next, i))
        return next->first + i;
      if (i >= now->count) continue;
      const Coder coder(now->inverse[i], now->zero_point[i], a.num_bits);
      std::int8_t* codes = a.codes + (now->first + i) * a.group_size;
      code_group<E, Symmetric, Stream>(coder, coding.take(a), a.group_size, codes);
    }
    const std::int64_t overflow = choose_params<Symmetric>(a, *next);
    if (overflow >= 0) return overflow;
    Params* const measured = next;
    next = now;
    now = measured;
    next->first = now->first + now->count;
  } while (now->count > 0);
  return -1;
}

std::int64_t quantize_rows(const QuantizeArgs& a, std::int64_t begin, std::int64_t end) {
  return with_type(a.weight.dtype, [&](auto element) -> std::int64_t {
    using E = decltype(element);
    const bool stream = can_stream(a.codes, a.in_features, end - begin) && a.group_size % 64 == 0;
    const auto symmetric = stream ? quantize_groups<E, true, true> : quantize_groups<E, true, false>;
    const auto asymmetric = stream ? quantize_groups<E, false, true> : quantize_groups<E, false, false>;
    const std::int64_t bad = (a.zero_point ? asymmetric : symmetric)(a, begin, end);  // a group
    stream_fence();
    return bad < 0 ? -1 : bad / a.groups;
  });
}

template <class E, bool Stream>
inline void dequantize_row(const DequantizeArgs& a, std::int64_t r) {
  auto* row = static_cast<typename E::T*>(a.out.data) + r * a.out.stride;
  const std::int8_t* codes = a.codes + r * a.in_features;
  for (std::int64_t g = 0; g < a.groups; ++g) {
    const std::int64_t at = r * a.groups + g;
    const VecF scale = set1(load_scalar(a.scale, a.scale_dtype, at));
    const VecF zero = set1(a.zero_point ? static_cast<float>(a.zero_point[at]) : 0.0f);
    std::int64_t k = g * a.group_size;
    const std::int64_t stop = k + a.group_size;
    for (; k + kWidth <= stop; k += kWidth) {
      read_ahead(codes + k);
      E::template store<Stream>(row + k, mul(sub(load_s8(codes + k), zero), scale));
    }
    if (k < stop) store_part<E>(row + k, mul(sub(load_codes_part(codes + k, stop - k), zero), scale), stop - k);
  }
}

void dequantize_rows(const DequantizeArgs& a, std::int64_t begin, std::int64_t end) {
  with_type(a.out.dtype, [&](auto element) {
    using E = decltype(element);
    const std::int64_t row_bytes = a.out.stride * static_cast<std::int64_t>(sizeof(typename E::T));
    const bool stream = can_stream(a.out.data, row_bytes, end - begin) && a.group_size % kWidth == 0;
    const auto row = stream ? dequantize_row<E, true> : dequantize_row<E, false>;
    for (std::int64_t r = begin; r < end; ++r) row(a, r);
    stream_fence();
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
        const Coder coder(1.0f / scale, zero_point, a.num_bits);
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

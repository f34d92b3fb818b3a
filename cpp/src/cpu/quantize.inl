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

// The largest magnitude, as the bits of the weight's dtype; NaN and inf are above all numbers.
inline std::uint32_t find_magnitude(const float* p, std::int64_t count) {
  VecI magnitude = zero_bits();
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    read_ahead(p + i);
    magnitude = max_bits(magnitude, abs_bits(load_f32(p + i)));
  }
  if (i < count) magnitude = max_bits(magnitude, abs_bits(load_part<F32>(p + i, count - i)));
  return reduce_max_bits(magnitude);
}
inline std::uint32_t find_magnitude(const std::uint16_t* p, std::int64_t count) {
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
  return reduce_max_bits16(magnitude);
}

struct GroupRange {
  float lo, hi;
};

template <class E>
inline GroupRange find_range(const typename E::T* p, std::int64_t count) {
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
struct GroupParams {
  std::int64_t first = 0, count = 0;  // groups, counted through all rows
  alignas(64) std::uint32_t magnitude[kWidth] = {};
  alignas(64) float lo[kWidth] = {};
  alignas(64) float wanted[kWidth] = {};  // largest magnitude or width of the range, then the scale asked for
  alignas(64) float scale[kWidth];        // as stored
  alignas(64) float inverse[kWidth];
  alignas(64) float zero_point[kWidth] = {};
};

// Walks through the groups of a weight whose rows need not be adjacent.
template <class E>
struct GroupCursor {
  const typename E::T* p;
  std::int64_t left;  // groups of the row from here on

  GroupCursor(const QuantizeArgs& a, std::int64_t row)
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
inline void measure_group(const typename E::T* p, std::int64_t count, GroupParams& params, std::int64_t i) {
  params.magnitude[i] = find_magnitude(p, count);
  if constexpr (!Symmetric) {
    const GroupRange range = find_range<E>(p, count);
    params.lo[i] = range.lo;
    params.wanted[i] = range.hi - range.lo;
  }
}

template <class E>
inline VecF magnitudes(const GroupParams& params) {
  typename E::T stored[kWidth];
  if constexpr (std::is_same_v<E, F32>) {
    std::memcpy(stored, params.magnitude, sizeof stored);
  } else {
    for (int i = 0; i < kWidth; ++i) stored[i] = static_cast<std::uint16_t>(params.magnitude[i]);
  }
  return E::load(stored);
}

// The first of the groups in use whose value is no finite number, or -1.
inline std::int64_t find_overflow(const GroupParams& params, VecF values) {
  constexpr std::uint32_t kInf = 0x7f800000u;
  if (reduce_max_bits(abs_bits(values)) < kInf) return -1;
  float each[kWidth];
  store_f32(each, values);
  std::int64_t i = 0;
  while (each[i] <= FLT_MAX) ++i;
  return params.first + i;
}

// Rounds the scales to their dtype, stores those that are in use and keeps all as stored.
template <class E>
inline void store_scales(GroupParams& params, void* scale, float tiny) {
  typename E::T stored[kWidth];
  E::store(stored, load_f32(params.wanted));
  store_f32(params.scale, E::load(stored));
  // A scale that rounds to nothing: its whole group is coded as zeros.
  for (float& s : params.scale) s = s < FLT_MIN ? tiny : s;
  store_part<E>(static_cast<typename E::T*>(scale) + params.first, load_f32(params.scale), params.count);
}

// From measurements to parameters; returns the first group that holds NaN or inf or overflows its scale, or -1.
template <class E, bool Symmetric>
inline std::int64_t choose_params(const QuantizeArgs& a, GroupParams& params) {
  const float levels = static_cast<float>((1 << a.num_bits) - 1), half = static_cast<float>(1 << (a.num_bits - 1));
  const VecF magnitude = magnitudes<E>(params);
  const std::int64_t unusable = find_overflow(params, magnitude);
  if (unusable >= 0) return unusable;
  if constexpr (Symmetric) store_f32(params.wanted, magnitude);
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
  return find_overflow(params, load_f32(params.scale));
}

struct GroupCoder {
  VecF inverse, zero, low, high;
  VecI low_byte, high_byte;

  explicit GroupCoder(int num_bits)
      : low(set1(-static_cast<float>(1 << (num_bits - 1)))),
        high(set1(static_cast<float>((1 << (num_bits - 1)) - 1))),
        low_byte(set1_s8(-(1 << (num_bits - 1)))),
        high_byte(set1_s8((1 << (num_bits - 1)) - 1)) {}

  void set(float inverse_scale, float zero_point) {
    inverse = set1(inverse_scale);
    zero = set1(zero_point);
  }
  VecF code(VecF v) const { return min(high, max(low, add(rint(mul(v, inverse)), zero))); }
};

template <class E, bool Symmetric, bool Stream>
inline void code_group(const GroupCoder& coder, const typename E::T* p, std::int64_t count, std::int8_t* codes) {
  const VecI zero = to_int(coder.zero);
  // The group's own scale keeps these products far inside int32, so they are clamped as bytes.
  const auto at = [&](std::int64_t i) {
    const VecI rounded = to_int(mul(E::load(p + i), coder.inverse));
    return Symmetric ? rounded : add_int(rounded, zero);
  };
  std::int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
    read_further_ahead(p + i, 4 * kWidth * sizeof *p);
    store_s8x4<Stream>(codes + i, at(i), at(i + kWidth), at(i + 2 * kWidth), at(i + 3 * kWidth), coder.low_byte,
                       coder.high_byte);
  }
  for (; i + kWidth <= count; i += kWidth) store_s8(codes + i, coder.code(E::load(p + i)));
  if (i < count) store_codes_part(codes + i, coder.code(load_part<E>(p + i, count - i)), count - i);
}

// Inputs of one batch of groups: small enough to be still in the first cache when they are coded.
constexpr std::int64_t kBatchInputs = 2048;

// While one batch is coded the next one is measured, so that memory is read all the time.
template <class E, bool Symmetric, bool Stream>
std::int64_t quantize_groups(const QuantizeArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t fitting = kBatchInputs / (a.group_size + 1) + 1, batch = min64(fitting, kWidth);
  GroupParams params[2];
  GroupParams *now = &params[0], *next = &params[1];
  GroupCursor<E> measuring(a, begin), coding(a, begin);
  GroupCoder coder(a.num_bits);
  next->first = begin * a.groups;
  do {
    next->count = min64(batch, end * a.groups - next->first);
    for (std::int64_t i = 0; i < batch; ++i) {
      if (i < next->count) measure_group<E, Symmetric>(measuring.take(a), a.group_size, *next, i);
      if (i >= now->count) continue;
      coder.set(now->inverse[i], now->zero_point[i]);
      std::int8_t* codes = a.codes + (now->first + i) * a.group_size;
      code_group<E, Symmetric, Stream>(coder, coding.take(a), a.group_size, codes);
    }
    const std::int64_t unusable = choose_params<E, Symmetric>(a, *next);
    if (unusable >= 0) return unusable;
    GroupParams* const measured = next;
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
    const auto put = [&](std::int64_t k) {
      E::template store<Stream>(row + k, mul(sub(load_s8(codes + k), zero), scale));
    };
    std::int64_t k = g * a.group_size;
    const std::int64_t stop = k + a.group_size;
    for (; k + 4 * kWidth <= stop; k += 4 * kWidth) {
      read_ahead(codes + k);
      for (int i = 0; i < 4; ++i) put(k + i * kWidth);
    }
    for (; k + kWidth <= stop; k += kWidth) put(k);
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
  GroupCoder coder(a.num_bits);
  with_type(a.x.dtype, [&](auto element) {
    using E = decltype(element);
    for (std::int64_t r = begin; r < end; ++r) {
      const auto* in = static_cast<const typename E::T*>(a.x.data) + r * a.x.stride;
      auto* out = static_cast<typename E::T*>(a.out.data) + r * a.out.stride;
      for (std::int64_t g = 0; g < a.groups; ++g) {
        const std::int64_t at = r * a.groups + g;
        const float scale = load_scalar(a.scale, a.scale_dtype, at);
        const float zero_point = a.zero_point ? static_cast<float>(a.zero_point[at]) : 0.0f;
        coder.set(1.0f / scale, zero_point);
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

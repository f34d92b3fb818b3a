// Activations as the int8 kernels read them: rows of codes, one scale per 128 inputs, one sum per weight block.
#pragma once

#include "cpu/quantize.inl"

namespace qtale::cpu {
namespace {

inline std::size_t aligned(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

// The workspace of the row-major int8 form.
struct Int8Rows {
  std::int8_t* codes;  // [rows, k_padded]
  float* scales;       // [rows, act_groups]
  std::int32_t* sums;  // [rows, blocks]
  float* totals;       // [rows]: sums of the activations as rounded

  Int8Rows(const Layout& l, std::int64_t rows, std::byte* workspace) {
    const auto count = static_cast<std::size_t>(rows);
    const std::size_t code_bytes = aligned(count * static_cast<std::size_t>(l.k_padded));
    const std::size_t scale_bytes = aligned(count * static_cast<std::size_t>(l.act_groups) * sizeof(float));
    codes = reinterpret_cast<std::int8_t*>(workspace);
    scales = reinterpret_cast<float*>(workspace + code_bytes);
    const std::size_t sum_bytes = aligned(count * static_cast<std::size_t>(l.blocks) * sizeof(std::int32_t));
    sums = reinterpret_cast<std::int32_t*>(workspace + code_bytes + scale_bytes);
    totals = reinterpret_cast<float*>(workspace + code_bytes + scale_bytes + sum_bytes);
  }
};

inline std::size_t int8_rows_bytes(const Layout& l, std::int64_t rows) {
  const auto count = static_cast<std::size_t>(rows);
  return aligned(count * static_cast<std::size_t>(l.k_padded)) +
         aligned(count * static_cast<std::size_t>(l.act_groups) * sizeof(float)) +
         aligned(count * static_cast<std::size_t>(l.blocks) * sizeof(std::int32_t)) + aligned(count * sizeof(float));
}

template <class E>
inline float activation_amax(const typename E::T* p, std::int64_t count) {
  VecI magnitude = zero_bits();
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) magnitude = max_bits(magnitude, abs_bits(E::load(p + i)));
  if (i < count) magnitude = max_bits(magnitude, abs_bits(load_part<E>(p + i, count - i)));
  const std::uint32_t bits = reduce_max_bits(magnitude);
  float amax;
  std::memcpy(&amax, &bits, sizeof amax);
  return amax;
}

// One group of at most 128 inputs, zero-padded to `padded`; returns its scale. NaN or inf make the scale NaN.
template <class E>
inline float quantize_activation_group(const typename E::T* p, std::int64_t count, std::int64_t padded,
                                       std::int8_t* codes) {
  const float amax = activation_amax<E>(p, count);
  const bool finite = amax <= FLT_MAX;
  const float scale = amax / 127.0f;
  const VecF inverse = set1(finite && scale >= FLT_MIN ? 1.0f / scale : 0.0f);
  if (!finite) {
    std::memset(codes, 0, static_cast<std::size_t>(padded));
    const std::uint32_t nan_bits = 0x7fc00000u;
    float nan;
    std::memcpy(&nan, &nan_bits, sizeof nan);
    return nan;
  }
  const VecF low = set1(-127.0f), high = set1(127.0f);
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store_s8(codes + i, min(high, max(low, rint(mul(E::load(p + i), inverse)))));
  if (i < count) {
    const VecF v = load_part<E>(p + i, count - i);
    store_codes_part(codes + i, min(high, max(low, rint(mul(v, inverse)))), count - i);
    i = count;
  }
  if (i < padded) std::memset(codes + i, 0, static_cast<std::size_t>(padded - i));
  return scale;
}

inline std::int32_t sum_codes(const std::int8_t* codes, std::int64_t count) {
  VecF sum = set1(0.0f);
  for (std::int64_t i = 0; i < count; i += kWidth) sum = add(sum, load_s8(codes + i));
  return static_cast<std::int32_t>(reduce_add(sum));
}

inline void prepare_int8_rows(const MatmulArgs& a, std::int64_t begin, std::int64_t end) {
  const Layout& l = *a.layout;
  const Int8Rows out(l, a.rows, a.workspace);
  with_type(a.x.dtype, [&](auto element) {
    using E = decltype(element);
    for (std::int64_t m = begin; m < end; ++m) {
      const auto* row = static_cast<const typename E::T*>(a.x.data) + m * a.x.stride;
      std::int8_t* codes = out.codes + m * l.k_padded;
      for (std::int64_t g = 0; g < l.act_groups; ++g) {
        const std::int64_t k = g * kActGroup;
        out.scales[m * l.act_groups + g] = quantize_activation_group<E>(row + k, min64(kActGroup, l.k - k),
                                                                        min64(kActGroup, l.k_padded - k), codes + k);
      }
      float total = 0.0f;
      for (std::int64_t b = 0; b < l.blocks; ++b) {
        const std::int32_t sum = sum_codes(codes + b * l.block_k, l.block_size(b));
        out.sums[m * l.blocks + b] = sum;
        total += static_cast<float>(sum) * out.scales[m * l.act_groups + b * l.block_k / kActGroup];
      }
      out.totals[m] = total;
    }
  });
}

// Rows of the next tile. Two even tiles instead of a full one and a thin rest, which would run at half its speed.
inline std::int64_t next_tile(std::int64_t rest, std::int64_t tile) {
  return rest > tile && rest < 2 * tile ? (rest + 1) / 2 : min64(rest, tile);
}

// Writes `count` finished float32 outputs of one row, with bias, in the dtype of y.
inline void store_outputs(const MatmulArgs& a, std::int64_t row, std::int64_t col, const float* values,
                          std::int64_t count) {
  with_type(a.y.dtype, [&](auto element) {
    using E = decltype(element);
    auto* out = static_cast<typename E::T*>(a.y.data) + row * a.y.stride + col;
    std::int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      const VecF v = load_f32(values + i);
      E::store(out + i, a.bias ? add(v, load_f32(a.bias + col + i)) : v);
    }
    if (i < count) {
      const VecF v = load_part<F32>(values + i, count - i);
      store_part<E>(out + i, a.bias ? add(v, load_part<F32>(a.bias + col + i, count - i)) : v, count - i);
    }
  });
}

}  // namespace
}  // namespace qtale::cpu

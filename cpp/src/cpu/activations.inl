// Activations as the int8 kernels read them: rows of codes, one scale per 128 inputs, one sum per weight block.
#pragma once

#include <cfloat>
#include <cstring>

#include "cpu/elements.inl"
#include "cpu/kernels.h"

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

// One group of inputs, zero-padded to `padded`, and the sums of its codes per `block` inputs; returns its
// scale. NaN or inf make the scale NaN and the codes zero. No code leaves [-127, 127]: 127 / amax rounds by 2^-23.
template <class E>
inline float quantize_activation_group(const typename E::T* p, std::int64_t count, std::int64_t padded,
                                       std::int64_t block, std::int8_t* codes, std::int32_t* sums) {
  const float amax = activation_amax<E>(p, count);
  const bool finite = amax <= FLT_MAX;
  const float scale = amax / 127.0f;
  const VecF inverse = set1(scale >= FLT_MIN ? 1.0f / scale : 0.0f);
  const std::int64_t used = finite ? count : 0;
  for (std::int64_t i = 0; i < padded; ++sums) {
    VecF sum = set1(0.0f);
    for (const std::int64_t stop = min64(i + block, padded); i < stop; i += kWidth) {
      const std::int64_t rest = used - i;
      const VecF value = rest >= kWidth ? E::load(p + i) : rest > 0 ? load_part<E>(p + i, rest) : set1(0.0f);
      const VecF code = rint(mul(value, inverse));
      store_s8(codes + i, code);
      sum = add(sum, code);
    }
    *sums = static_cast<std::int32_t>(reduce_add(sum));
  }
  return finite ? scale : amax - amax;
}

inline void prepare_int8_rows(const MatmulArgs& a, std::int64_t begin, std::int64_t end) {
  const Layout& l = *a.layout;
  const Int8Rows out(l, a.rows, a.workspace);
  with_type(a.x.dtype, [&](auto element) {
    using E = decltype(element);
    for (std::int64_t m = begin; m < end; ++m) {
      const auto* row = static_cast<const typename E::T*>(a.x.data) + m * a.x.stride;
      float* scales = out.scales + m * l.act_groups;
      std::int32_t* sums = out.sums + m * l.blocks;
      for (std::int64_t k = 0; k < l.k_padded; k += kActGroup)
        scales[k / kActGroup] =
            quantize_activation_group<E>(row + k, min64(kActGroup, l.k - k), min64(kActGroup, l.k_padded - k),
                                         l.block_k, out.codes + m * l.k_padded + k, sums + k / l.block_k);
      float total = 0.0f;
      for (std::int64_t b = 0; b < l.blocks; ++b)
        total += static_cast<float>(sums[b]) * scales[b * l.block_k / kActGroup];
      out.totals[m] = total;
    }
  });
}

// Rows of the next tile: as few tiles as will do, as even as they can be, since a thin one runs at half the speed.
inline std::int64_t next_tile(std::int64_t rest, std::int64_t tile) {
  const std::int64_t tiles = (rest + tile - 1) / tile;
  return (rest + tiles - 1) / tiles;
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

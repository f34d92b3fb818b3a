// Activations as the int8 kernels read them: rows of codes, one scale per 128 inputs, one sum per weight block. In
// int16 mode an activation row has two rows of codes, planes: the second codes what the first left over.
#pragma once

#include <cfloat>
#include <cstring>

#include "cpu/elements.inl"
#include "cpu/kernels.h"

namespace qtale::cpu {
namespace {

inline std::size_t aligned(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

// The workspace of the row-major int8 form. Its rows are those of codes.
struct Int8Rows {
  std::int8_t* codes;  // [rows, k_padded]
  float* scales;       // [rows, act_groups]
  std::int32_t* sums;  // [rows, blocks]
  float* totals;       // [activation rows]: sums of the activations as rounded

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

inline std::size_t code_rows_bytes(const Layout& l, std::int64_t rows) {
  const auto count = static_cast<std::size_t>(rows);
  return aligned(count * static_cast<std::size_t>(l.k_padded)) +
         aligned(count * static_cast<std::size_t>(l.act_groups) * sizeof(float)) +
         aligned(count * static_cast<std::size_t>(l.blocks) * sizeof(std::int32_t)) + aligned(count * sizeof(float));
}

constexpr float kPlaneStep = 254.0f;  // the scale of a plane over that of the next

template <int Planes>
std::size_t int8_rows_bytes(const Layout& l, std::int64_t rows) {
  return code_rows_bytes(l, rows * Planes);
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

// Codes one group of inputs, zero-padded to `padded`, by a scale, and sums the codes per `block` inputs. `left_over`
// gets what they miss, or is nullptr. No code leaves [-127, 127]: 127 / amax rounds by 2^-23.
template <class E>
inline void code_plane(const typename E::T* p, std::int64_t count, std::int64_t padded, std::int64_t block, float scale,
                       std::int8_t* codes, std::int32_t* sums, float* left_over) {
  const VecF inverse = set1(scale >= FLT_MIN ? 1.0f / scale : 0.0f), less = set1(-scale);
  for (std::int64_t i = 0; i < padded; ++sums) {
    VecF sum = set1(0.0f);
    for (const std::int64_t stop = min64(i + block, padded); i < stop; i += kWidth) {
      const std::int64_t rest = count - i;
      const VecF value = rest >= kWidth ? E::load(p + i) : rest > 0 ? load_part<E>(p + i, rest) : set1(0.0f);
      const VecF code = rint(mul(value, inverse));
      store_s8(codes + i, code);
      sum = add(sum, code);
      if (left_over != nullptr) store_f32(left_over + i, multiply_add(code, less, value));
    }
    *sums = static_cast<std::int32_t>(reduce_add(sum));
  }
}

// Codes one group by its largest input and returns the scale; NaN or inf make it NaN and the codes zero.
template <class E>
inline float quantize_activation_group(const typename E::T* p, std::int64_t count, std::int64_t padded,
                                       std::int64_t block, std::int8_t* codes, std::int32_t* sums,
                                       float* left_over = nullptr) {
  const float amax = activation_amax<E>(p, count);
  if (amax <= FLT_MAX) {
    // 127 times the scale of the largest numbers would round to infinity.
    const float scale = (left_over != nullptr && amax > 0x1.fffffcp127f ? 0x1.fffffcp127f : amax) / 127.0f;
    code_plane<E>(p, count, padded, block, scale, codes, sums, left_over);
    return scale;
  }
  code_plane<E>(p, 0, padded, block, 0.0f, codes, sums, left_over);
  return amax - amax;
}

// One activation row, of which the rows of codes begin at `row`.
template <int Planes, class E>
void prepare_int8_row(const Layout& l, const Int8Rows& out, std::int64_t row, const typename E::T* x) {
  alignas(64) float left_over[kActGroup];
  for (std::int64_t k = 0; k < l.k_padded; k += kActGroup) {
    const std::int64_t count = min64(kActGroup, l.k - k), padded = min64(kActGroup, l.k_padded - k);
    std::int8_t* codes = out.codes + row * l.k_padded + k;
    std::int32_t* sums = out.sums + row * l.blocks + k / l.block_k;
    float* scale = out.scales + row * l.act_groups + k / kActGroup;
    *scale =
        quantize_activation_group<E>(x + k, count, padded, l.block_k, codes, sums, Planes > 1 ? left_over : nullptr);
    if constexpr (Planes > 1) {
      const float next = *scale / kPlaneStep;
      scale[l.act_groups] = next;
      code_plane<F32>(left_over, padded, padded, l.block_k, next, codes + l.k_padded, sums + l.blocks, nullptr);
    }
  }
}

template <int Planes>
void prepare_int8_rows(const MatmulArgs& a, std::int64_t begin, std::int64_t end) {
  static_assert(Planes <= 2);
  const Layout& l = *a.layout;
  const Int8Rows out(l, a.rows * Planes, a.workspace);
  with_type(a.x.dtype, [&](auto element) {
    using E = decltype(element);
    for (std::int64_t m = begin; m < end; ++m) {
      prepare_int8_row<Planes, E>(l, out, m * Planes, static_cast<const typename E::T*>(a.x.data) + m * a.x.stride);
      float total = 0.0f;
      for (std::int64_t row = m * Planes; row < (m + 1) * Planes; ++row)
        for (std::int64_t b = 0; b < l.blocks; ++b)
          total += static_cast<float>(out.sums[row * l.blocks + b]) *
                   out.scales[row * l.act_groups + b * l.block_k / kActGroup];
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

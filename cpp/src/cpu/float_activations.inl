// Activations as the float kernels read them: zero-padded float32 rows and, for zero points, one sum per weight block.
#pragma once

#include "cpu/activations.inl"

namespace qtale::cpu {
namespace {

struct FloatRows {
  float* values;  // [rows, k_padded]
  float* sums;    // [rows, blocks]

  FloatRows(const Layout& l, std::int64_t rows, std::byte* workspace) {
    values = reinterpret_cast<float*>(workspace);
    sums = reinterpret_cast<float*>(workspace + aligned(static_cast<std::size_t>(rows * l.k_padded) * sizeof(float)));
  }
};

std::size_t float_rows_bytes(const Layout& l, std::int64_t rows) {
  return aligned(static_cast<std::size_t>(rows * l.k_padded) * sizeof(float)) +
         aligned(static_cast<std::size_t>(rows * l.blocks) * sizeof(float));
}

void prepare_float_rows(const MatmulArgs& a, std::int64_t begin, std::int64_t end) {
  const Layout& l = *a.layout;
  const FloatRows out(l, a.rows, a.workspace);
  with_type(a.x.dtype, [&](auto element) {
    using E = decltype(element);
    for (std::int64_t m = begin; m < end; ++m) {
      const auto* row = static_cast<const typename E::T*>(a.x.data) + m * a.x.stride;
      float* values = out.values + m * l.k_padded;
      std::int64_t k = 0;
      for (; k + kWidth <= l.k; k += kWidth) store_f32(values + k, E::load(row + k));
      for (; k < l.k_padded; k += kWidth) store_f32(values + k, k < l.k ? load_part<E>(row + k, l.k - k) : set1(0.0f));
      for (std::int64_t b = 0; b < l.blocks; ++b) {
        VecF sum = set1(0.0f);
        for (std::int64_t i = 0; i < l.block_size(b); i += kWidth) sum = add(sum, load_f32(values + b * l.block_k + i));
        out.sums[m * l.blocks + b] = reduce_add(sum);
      }
    }
  });
}

}  // namespace
}  // namespace qtale::cpu

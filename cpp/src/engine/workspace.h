// Float matrices that a call writes and the next call reuses.
#pragma once

#include <array>
#include <cstdint>

#include "cpu/scratch.h"
#include "qtale/tensor.h"

namespace qtale::engine {

enum class Buffer : std::uint8_t {
  residual,
  compact,
  normed,
  qkv,
  attention,
  delta,
  gate_up,
  activated,
  router,
  count
};

class Workspace {
 public:
  // [rows, cols], contents undefined; what the same name gave before is gone.
  TensorView matrix(Buffer name, std::int64_t rows, std::int64_t cols, DType dtype = DType::f32) {
    auto& scratch = buffers_[static_cast<std::size_t>(name)];
    std::byte* memory = scratch.reserve(static_cast<std::size_t>(rows * cols * size_of(dtype)));
    return TensorView::matrix(memory, dtype, rows, cols);
  }

 private:
  std::array<cpu::Scratch, static_cast<std::size_t>(Buffer::count)> buffers_;
};

// Columns [first, first + count) of a matrix.
inline TensorView columns(const TensorView& matrix, std::int64_t first, std::int64_t count) {
  TensorView part = matrix;
  part.data = matrix.as<float>() + first;
  part.shape[1] = count;
  return part;
}

// The same memory as [rows, heads, head_dim].
inline TensorView heads_of(const TensorView& matrix, std::int64_t head_dim) {
  TensorView view = matrix;
  view.rank = 3;
  view.shape = {matrix.shape[0], matrix.shape[1] / head_dim, head_dim, 0};
  view.strides = {matrix.strides[0], head_dim, 1, 0};
  return view;
}

}  // namespace qtale::engine

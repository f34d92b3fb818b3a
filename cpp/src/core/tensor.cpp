#include "qtale/tensor.h"

namespace qtale {

std::int64_t TensorView::numel() const {
  std::int64_t count = 1;
  for (int d = 0; d < rank; ++d) count *= shape[d];
  return count;
}

bool TensorView::is_contiguous() const {
  std::int64_t expected = 1;
  for (int d = rank - 1; d >= 0; --d) {
    if (shape[d] != 1 && strides[d] != expected) return numel() == 0;
    expected *= shape[d];
  }
  return true;
}

TensorView TensorView::vector(void* data, DType dtype, std::int64_t size) { return {data, dtype, 1, {size}, {1}, {}}; }

TensorView TensorView::matrix(void* data, DType dtype, std::int64_t rows, std::int64_t cols) {
  return {data, dtype, 2, {rows, cols}, {cols, 1}, {}};
}

}  // namespace qtale

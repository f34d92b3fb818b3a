#include "core/text.h"
#include "cpu/backend.h"
#include "ops/check.h"
#include "qtale/ops.h"

namespace qtale {

void project_topk(const TensorView& x, const TensorView& matrix, const TensorView& values, const TensorView& indices) {
  constexpr auto op = "project_topk";
  ops::check_matrix(op, "x", x, DType::f32);
  ops::check_float_matrix(op, "matrix", matrix);
  const std::int64_t rows = x.shape[0], depth = x.shape[1], entries = matrix.shape[0];
  if (matrix.shape[1] != depth)
    fail_input("project_topk: x has {} features, the matrix {}; both need the same.", depth, matrix.shape[1]);
  if (entries > INT32_MAX)
    fail_input("project_topk: the matrix has {} rows; indices are int32, so use at most {}.", entries, INT32_MAX);
  ops::check_matrix(op, "values", values, DType::f32);
  const std::int64_t k = values.shape[1];
  if (k < 1 || k > entries)
    fail_input("project_topk: k is {}, but the matrix has {} rows; use a k from 1 to that.", k, entries);
  ops::check_shape(op, "values", values, rows, k);
  ops::check_shape(op, "indices", indices, DType::s32, rows, k);
  cpu::project_topk({x.data, x.dtype, x.strides[0]}, rows, depth, {matrix.data, matrix.dtype, matrix.strides[0]},
                    entries, k, values.as<float>(), indices.as<std::int32_t>());
}

}  // namespace qtale

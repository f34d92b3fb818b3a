#include "core/text.h"
#include "cpu/backend.h"
#include "ops/check.h"
#include "qtale/decoder_ops.h"

namespace qtale {
void matmul(const TensorView& x, const TensorView& weight, const TensorView* bias, const TensorView& y,
            Compute compute) {
  constexpr auto op = "matmul";
  ops::check_matrix(op, "x", x, DType::f32);
  ops::check_float_matrix(op, "weight", weight);
  const std::int64_t rows = x.shape[0], in = x.shape[1], out = weight.shape[0];
  if (weight.shape[1] != in) fail_input("matmul: x has {} features; the weight takes {}.", in, weight.shape[1]);
  ops::check_matrix(op, "y", y, DType::f32);
  if (y.shape[0] != rows || y.shape[1] != out)
    fail_input("matmul: y has shape {}; expected [{}, {}].", ops::shape_text(y), rows, out);
  if (bias != nullptr) {
    ops::check_dtype(op, "bias", *bias, DType::f32);
    ops::check_cpu(op, *bias);
    if (bias->rank != 1 || bias->shape[0] != out)
      fail_input("matmul: bias has shape {}; expected [{}].", ops::shape_text(*bias), out);
    ops::check_contiguous(op, "bias", *bias);
  }
  cpu::matmul({x.data, x.dtype, x.strides[0]}, rows, in, {weight.data, weight.dtype, weight.strides[0]}, out,
              {y.as<float>(), y.strides[0], bias ? bias->as<const float>() : nullptr}, compute);
}

}  // namespace qtale

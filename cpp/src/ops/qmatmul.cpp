#include "core/text.h"
#include "cpu/backend.h"
#include "ops/check.h"
#include "qtale/ops.h"

namespace qtale {

void qmatmul(const TensorView& x, const TensorView& prepacked, const TensorView* bias, const TensorView& y,
             Compute compute) {
  constexpr auto op = "qmatmul";
  ops::check_float(op, "x", x);
  ops::check_matrix(op, "x", x);
  ops::check_cpu(op, x);
  const PrepackedInfo info = prepacked_info(prepacked);
  if (x.shape[1] != info.in_features)
    fail_input("qmatmul: x has {} features; the weight takes {}.", x.shape[1], info.in_features);
  ops::check_dtype(op, "y", y, x.dtype);
  ops::check_matrix(op, "y", y);
  if (y.shape[0] != x.shape[0] || y.shape[1] != info.out_features)
    fail_input("qmatmul: y has shape {}; expected [{}, {}].", ops::shape_text(y), x.shape[0], info.out_features);
  ops::check_cpu(op, y);
  if (bias != nullptr) {
    ops::check_dtype(op, "bias", *bias, DType::f32);
    ops::check_cpu(op, *bias);
    if (bias->rank != 1 || bias->shape[0] != info.out_features)
      fail_input("qmatmul: bias has shape {}; expected [{}].", ops::shape_text(*bias), info.out_features);
    ops::check_contiguous(op, "bias", *bias);
  }
  cpu::qmatmul(prepacked.as<const std::uint8_t>(), prepacked.shape[0], x.shape[0], {x.data, x.dtype, x.strides[0]},
               bias ? bias->as<const float>() : nullptr, {y.data, y.dtype, y.strides[0]}, compute);
}

}  // namespace qtale

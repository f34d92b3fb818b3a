#include "core/text.h"
#include "cpu/backend.h"
#include "ops/check.h"
#include "qtale/decoder_ops.h"

namespace qtale {
namespace {

constexpr auto kOp = "matmul";

cpu::DenseProduct checked(const TensorView& x, const TensorView& weight, const TensorView* bias, const TensorView& y) {
  ops::check_matrix(kOp, "x", x, DType::f32);
  ops::check_float_matrix(kOp, "weight", weight);
  const std::int64_t rows = x.shape[0], in = x.shape[1], out = weight.shape[0];
  if (weight.shape[1] != in) fail_input("matmul: x has {} features; the weight takes {}.", in, weight.shape[1]);
  ops::check_matrix(kOp, "y", y, DType::f32);
  if (y.shape[0] != rows || y.shape[1] != out)
    fail_input("matmul: y has shape {}; expected [{}, {}].", ops::shape_text(y), rows, out);
  if (bias != nullptr) {
    ops::check_dtype(kOp, "bias", *bias, DType::f32);
    ops::check_cpu(kOp, *bias);
    if (bias->rank != 1 || bias->shape[0] != out)
      fail_input("matmul: bias has shape {}; expected [{}].", ops::shape_text(*bias), out);
    ops::check_contiguous(kOp, "bias", *bias);
  }
  return {{x.data, x.dtype, x.strides[0]},
          rows,
          in,
          {weight.data, weight.dtype, weight.strides[0]},
          {},
          out,
          {y.as<float>(), y.strides[0], bias ? bias->as<const float>() : nullptr}};
}

}  // namespace

void matmul(const TensorView& x, const TensorView& weight, const TensorView* bias, const TensorView& y,
            Compute compute) {
  cpu::matmul(checked(x, weight, bias, y), compute);
}

bool gated_matmul(const TensorView& x, const TensorView& gate, const TensorView& up, const TensorView& y,
                  Compute compute) {
  cpu::DenseProduct product = checked(x, gate, nullptr, y);
  product.up = checked(x, up, nullptr, y).matrix;
  if (gate.dtype != up.dtype)
    fail_input("matmul: the gate is {}, but what it gates is {}; use one dtype.", name_of(gate.dtype),
               name_of(up.dtype));
  if (!cpu::has_gated_products(compute, x.shape[0])) return false;
  cpu::matmul(product, compute);
  return true;
}

}  // namespace qtale

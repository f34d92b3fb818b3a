#include "core/text.h"
#include "cpu/backend.h"
#include "cpu/isa.h"
#include "ops/check.h"
#include "qtale/decoder_ops.h"

namespace qtale {
namespace {

const cpu::ProjectKernel& kernel_for(Compute compute, std::int64_t in_features) {
  const cpu::KernelTable& table = cpu::kernels();
  if (compute != Compute::bfloat16) return table.project;
  if (table.bf16_project == nullptr)
    fail_input("matmul: {} has no products of bfloat16 numbers (AVX-512 BF16 has); compute in float.", table.name);
  if (in_features % 2 != 0)
    fail_input("matmul: bfloat16 numbers are multiplied by pairs, but x has {} features; compute in float.",
               in_features);
  return *table.bf16_project;
}

}  // namespace

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
  cpu::matmul(kernel_for(compute, in), {x.data, x.dtype, x.strides[0]}, rows, in,
              {weight.data, weight.dtype, weight.strides[0]}, out,
              {y.as<float>(), y.strides[0], bias ? bias->as<const float>() : nullptr});
}

}  // namespace qtale

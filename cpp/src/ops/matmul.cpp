#include <vector>

#include "core/text.h"
#include "cpu/backend.h"
#include "ops/check.h"
#include "qtale/decoder_ops.h"

namespace qtale {
namespace {

constexpr auto kOp = "matmul";

cpu::MatmulPart checked(const TensorView& x, const MatmulWeight& w) {
  ops::check_float_matrix(kOp, "weight", w.weight);
  const std::int64_t rows = x.shape[0], in = x.shape[1], out = w.weight.shape[0];
  if (w.weight.shape[1] != in) fail_input("matmul: x has {} features; the weight takes {}.", in, w.weight.shape[1]);
  ops::check_matrix(kOp, "y", w.y, DType::f32);
  if (w.y.shape[0] != rows || w.y.shape[1] != out)
    fail_input("matmul: y has shape {}; expected [{}, {}].", ops::shape_text(w.y), rows, out);
  if (w.bias != nullptr) {
    ops::check_dtype(kOp, "bias", *w.bias, DType::f32);
    ops::check_cpu(kOp, *w.bias);
    if (w.bias->rank != 1 || w.bias->shape[0] != out)
      fail_input("matmul: bias has shape {}; expected [{}].", ops::shape_text(*w.bias), out);
    ops::check_contiguous(kOp, "bias", *w.bias);
  }
  return {{w.weight.data, w.weight.dtype, w.weight.strides[0]},
          out,
          {w.y.as<float>(), w.y.strides[0], w.bias ? w.bias->as<const float>() : nullptr}};
}

}  // namespace

void matmul(const TensorView& x, std::span<const MatmulWeight> weights, Compute compute) {
  ops::check_matrix(kOp, "x", x, DType::f32);
  std::vector<cpu::MatmulPart> parts;
  for (const MatmulWeight& weight : weights) parts.push_back(checked(x, weight));
  cpu::matmul({x.data, x.dtype, x.strides[0]}, x.shape[0], x.shape[1], parts, compute);
}

void matmul(const TensorView& x, const TensorView& weight, const TensorView* bias, const TensorView& y,
            Compute compute) {
  const MatmulWeight one{weight, bias, y};
  matmul(x, {&one, 1}, compute);
}

bool gated_matmul(const TensorView& x, const TensorView& gate, const TensorView& up, const TensorView& y,
                  Compute compute) {
  ops::check_matrix(kOp, "x", x, DType::f32);
  cpu::MatmulPart part = checked(x, {gate, nullptr, y});
  part.up = checked(x, {up, nullptr, y}).matrix;
  if (gate.dtype != up.dtype)
    fail_input("matmul: the gate is {}, but what it gates is {}; use one dtype.", name_of(gate.dtype),
               name_of(up.dtype));
  if (!cpu::gates(compute, x.shape[0])) return false;
  cpu::matmul({x.data, x.dtype, x.strides[0]}, x.shape[0], x.shape[1], {&part, 1}, compute);
  return true;
}

}  // namespace qtale

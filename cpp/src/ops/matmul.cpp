#include "core/text.h"
#include "cpu/backend.h"
#include "ops/check.h"
#include "qtale/decoder_ops.h"

namespace qtale {
namespace {

constexpr auto kOp = "matmul";

void check_weight(const TensorView& weight) {
  is_tiled(weight) ? ops::check_tiles(kOp, "weight", weight) : ops::check_float_matrix(kOp, "weight", weight);
}

// Numbers from one output to the next, of tiles between the first ones of each.
std::int64_t stride_of(const TensorView& weight) { return is_tiled(weight) ? inputs_of(weight) : weight.strides[0]; }

void check_rows(std::string_view name, const TensorView& t, bool may_round) {
  ops::check_matrix(kOp, name, t, may_round && t.dtype == DType::bf16 ? DType::bf16 : DType::f32);
}

cpu::ProjectOut output_of(const TensorView& y, const TensorView* bias) {
  const float* const added = bias != nullptr ? bias->as<const float>() : nullptr;
  if (y.dtype == DType::bf16) return {nullptr, y.strides[0], added, y.as<std::uint16_t>()};
  return {y.as<float>(), y.strides[0], added};
}

cpu::DenseProduct checked(const TensorView& x, const TensorView& weight, const TensorView* bias, const TensorView& y,
                          bool gated = false) {
  check_rows("x", x, true);
  check_weight(weight);
  const std::int64_t rows = x.shape[0], in = x.shape[1], out = outputs_of(weight);
  if (inputs_of(weight) != in) fail_input("matmul: x has {} features; the weight takes {}.", in, inputs_of(weight));
  check_rows("y", y, gated);
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
          {weight.data, weight.dtype, stride_of(weight)},
          {},
          out,
          output_of(y, bias),
          is_tiled(weight)};
}

}  // namespace

void matmul(const TensorView& x, const TensorView& weight, const TensorView* bias, const TensorView& y,
            Compute compute) {
  cpu::matmul(checked(x, weight, bias, y), compute);
}

void round_weights(const TensorView& matrix, const TensorView& rounded) {
  constexpr auto op = "round_weights";
  ops::check_float_matrix(op, "matrix", matrix);
  const std::int64_t out = matrix.shape[0], in = matrix.shape[1];
  if (is_tiled(rounded)) {
    ops::check_tiles(op, "rounded", rounded);
    if (outputs_of(rounded) != out || inputs_of(rounded) != in)
      fail_input("round_weights: rounded has shape {}, which holds [{}, {}]; expected tiles of [{}, {}].",
                 ops::shape_text(rounded), outputs_of(rounded), inputs_of(rounded), out, in);
  } else {
    ops::check_shape(op, "rounded", rounded, DType::bf16, out, in);
  }
  cpu::round_weights(
      {{matrix.data, matrix.dtype, matrix.strides[0]}, in, rounded.as<std::uint16_t>(), is_tiled(rounded)}, out);
}

bool matmul_add(const TensorView& x, const TensorView& weight, const TensorView& y, Compute compute) {
  cpu::DenseProduct product = checked(x, weight, nullptr, y);
  product.out.adds = true;
  if (!cpu::has_fused_products(compute, x.shape[0])) return false;
  cpu::matmul(product, compute);
  return true;
}

bool gated_matmul(const TensorView& x, const TensorView& gate, const TensorView& up, const TensorView& y,
                  Compute compute) {
  cpu::DenseProduct product = checked(x, gate, nullptr, y, true);
  product.up = checked(x, up, nullptr, y, true).matrix;
  if (gate.dtype != up.dtype || is_tiled(gate) != is_tiled(up))
    fail_input("matmul: the gate is {} {}, but what it gates is {} {}; use one dtype and form.", name_of(gate.dtype),
               ops::shape_text(gate), name_of(up.dtype), ops::shape_text(up));
  if (!cpu::has_fused_products(compute, x.shape[0])) return false;
  cpu::matmul(product, compute);
  return true;
}

}  // namespace qtale

#include "cpu/backend.h"
#include "ops/check.h"
#include "qtale/ops.h"

namespace qtale {
namespace {

const std::int8_t* codes_of(const TensorView* t) { return t ? t->as<const std::int8_t>() : nullptr; }

}  // namespace

void quantize(const TensorView& weight, int num_bits, const TensorView& codes, const TensorView& scale,
              const TensorView* zero_point) {
  constexpr auto op = "quantize";
  ops::check_bits(op, num_bits);
  ops::check_float_matrix(op, "weight", weight);
  const std::int64_t out = weight.shape[0], in = weight.shape[1];
  ops::check_shape(op, "codes", codes, DType::s8, out, in);
  const std::int64_t groups = ops::check_params(op, out, in, scale, zero_point);
  const cpu::RowsIn input{weight.data, weight.dtype, weight.strides[0]};
  cpu::quantize({input, in, in / groups, groups, num_bits, codes.as<std::int8_t>(), scale.data, scale.dtype,
                 zero_point ? zero_point->as<std::int8_t>() : nullptr},
                out);
}

void dequantize(const TensorView& codes, const TensorView& scale, const TensorView* zero_point, const TensorView& out) {
  constexpr auto op = "dequantize";
  ops::check_dtype(op, "codes", codes, DType::s8);
  ops::check_matrix(op, "codes", codes);
  ops::check_contiguous(op, "codes", codes);
  ops::check_cpu(op, codes);
  const std::int64_t rows = codes.shape[0], in = codes.shape[1];
  const std::int64_t groups = ops::check_params(op, rows, in, scale, zero_point);
  ops::check_float(op, "out", out);
  ops::check_shape(op, "out", out, rows, in);
  ops::check_cpu(op, out);
  const cpu::RowsOut output{out.data, out.dtype, in};
  cpu::dequantize(
      {codes.as<const std::int8_t>(), scale.data, scale.dtype, codes_of(zero_point), in, in / groups, groups, output},
      rows);
}

void fake_quantize(const TensorView& x, const TensorView& scale, const TensorView* zero_point, int num_bits,
                   const TensorView& out) {
  constexpr auto op = "fake_quantize";
  ops::check_bits(op, num_bits);
  ops::check_float_matrix(op, "x", x);
  const std::int64_t rows = x.shape[0], in = x.shape[1];
  const std::int64_t groups = ops::check_params(op, rows, in, scale, zero_point);
  ops::check_shape(op, "out", out, x.dtype, rows, in);
  const cpu::RowsIn input{x.data, x.dtype, x.strides[0]};
  const cpu::RowsOut output{out.data, out.dtype, in};
  cpu::fake_quantize({input, scale.data, scale.dtype, codes_of(zero_point), in, in / groups, groups, num_bits, output},
                     rows);
}

}  // namespace qtale

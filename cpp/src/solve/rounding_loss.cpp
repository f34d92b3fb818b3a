#include <cmath>

#include "core/text.h"
#include "solve/check.h"

namespace qtale {
namespace {

constexpr auto kOp = "rounding_loss";

const float* check_column_scale(const TensorView* column_scale, std::int64_t in) {
  if (column_scale == nullptr) return nullptr;
  ops::check_vector(kOp, "column_scale", *column_scale, DType::f32, in);
  const auto* data = column_scale->as<const float>();
  for (std::int64_t i = 0; i < in; ++i)
    if (!(data[i] > 0.0f) || !std::isfinite(data[i]) || !std::isfinite(1.0f / data[i]))
      fail_input("{}: column_scale[{}] is {}; expected positive numbers.", kOp, i, data[i]);
  return data;
}

}  // namespace

double rounding_loss(const TensorView& weight, const TensorView& hessian, const TensorView* column_scale, int num_bits,
                     std::int64_t group_size, bool symmetric, DType scale_dtype) {
  ops::check_bits(kOp, num_bits);
  ops::check_matrix(kOp, "weight", weight, DType::f32);
  const std::int64_t in = weight.shape[1], size = solve::check_group_size(kOp, group_size, in);
  solve::check_finite(kOp, "weight", weight);
  solve::check_square(kOp, "hessian", hessian, in);
  if (!is_float(scale_dtype))
    fail_input("{}: scale_dtype {} is not supported; use float32, float16 or bfloat16.", kOp, name_of(scale_dtype));
  const cpu::SolveWeight w{weight.as<const float>(),
                           weight.strides[0],
                           weight.shape[0],
                           in,
                           size > 0 ? in / size : 1,
                           num_bits,
                           nullptr,
                           scale_dtype,
                           nullptr};
  const float* factors = check_column_scale(column_scale, in);
  if (in == 0) return 0.0;
  return cpu::rounding_loss({w,
                             hessian.as<const float>(),
                             hessian.strides[0],
                             factors,
                             {num_bits, symmetric, scale_dtype, 1, 1.0f, 1.0f, false}});
}

}  // namespace qtale

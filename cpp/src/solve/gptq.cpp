#include <cmath>

#include "core/text.h"
#include "solve/check.h"

namespace qtale {
namespace {

constexpr auto kOp = "gptq";

void check_diagonal(const TensorView& factor) {
  for (std::int64_t i = 0; i < factor.shape[0]; ++i) {
    const float value = factor.as<const float>()[i * (factor.strides[0] + 1)];
    if (!(value > 0.0f) || !std::isfinite(1.0f / value))
      fail_input(
          "gptq: factor[{}, {}] is {}; expected a Cholesky factor, whose diagonal is positive: dampen the "
          "Hessian.",
          i, i, value);
  }
}

}  // namespace

void gptq(const TensorView& weight, const TensorView& factor, const TensorView* order, int num_bits,
          const TensorView& scale, const TensorView* zero_point, bool static_scales, const TensorView& codes,
          const TensorView* loss, const ScaleSearch& search, const TensorView* importance) {
  const cpu::SolveWeight w = solve::check_weight(kOp, weight, num_bits, scale, zero_point);
  solve::check_square(kOp, "factor", factor, w.columns);
  check_diagonal(factor);
  const std::int32_t* visits = solve::check_order(kOp, order, w.columns);
  const cpu::GridRule rule = solve::check_search(kOp, search, num_bits, zero_point == nullptr, scale.dtype);
  if (static_scales) {
    solve::check_grids(kOp, w);
  } else if (visits != nullptr && w.groups > 1) {
    fail_input(
        "gptq: scales of {} groups cannot be found while columns are visited in another order; find them first "
        "and pass static_scales.",
        w.groups);
  }
  if (importance != nullptr) solve::check_importance(kOp, *importance, w.columns);
  if (loss != nullptr) ops::check_vector(kOp, "loss", *loss, DType::f64, w.rows);
  cpu::gptq({w, factor.as<const float>(), factor.strides[0], visits, static_scales, rule,
             importance ? importance->as<const float>() : nullptr, solve::check_codes_out(kOp, codes, w),
             loss ? loss->as<double>() : nullptr});
}

}  // namespace qtale

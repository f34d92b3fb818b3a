#include "core/text.h"
#include "solve/check.h"

namespace qtale {

std::int64_t refit_scales(const TensorView& weight, const TensorView& hessian, int num_bits, const TensorView& codes,
                          const TensorView* zero_point, const TensorView& scale) {
  constexpr auto op = "refit_scales";
  constexpr std::int64_t kMaxGroups = 1024;
  const cpu::SolveWeight w = solve::check_weight(op, weight, num_bits, scale, zero_point);
  solve::check_square(op, "hessian", hessian, w.columns);
  solve::check_grids(op, w);
  if (w.groups > kMaxGroups)
    fail_input("{}: {} groups per row make too large a system; use up to {}.", op, w.groups, kMaxGroups);
  const std::int8_t* data = solve::check_codes_out(op, codes, w);
  ops::check_codes(op, codes, num_bits);
  return cpu::refit_scales({w, hessian.as<const float>(), hessian.strides[0], data});
}

}  // namespace qtale

#include "core/text.h"
#include "solve/check.h"

namespace qtale {

std::int64_t refine_codes(const TensorView& weight, const TensorView& hessian, int num_bits, const TensorView& scale,
                          const TensorView* zero_point, const TensorView* order, int sweeps, const TensorView& codes) {
  constexpr auto op = "refine_codes";
  constexpr int kMaxSweeps = 10000;
  const cpu::SolveWeight w = solve::check_weight(op, weight, num_bits, scale, zero_point);
  solve::check_square(op, "hessian", hessian, w.columns);
  solve::check_grids(op, w);
  const std::int32_t* visits = solve::check_order(op, order, w.columns);
  if (sweeps < 0 || sweeps > kMaxSweeps) fail_input("{}: {} sweeps; use 0 to {}.", op, sweeps, kMaxSweeps);
  std::int8_t* data = solve::check_codes_out(op, codes, w);
  ops::check_codes(op, codes, num_bits);
  return cpu::refine_codes({w, hessian.as<const float>(), hessian.strides[0], visits, sweeps, data});
}

}  // namespace qtale

#include "core/text.h"
#include "solve/check.h"

namespace qtale {

void search_scales(const TensorView& weight, const TensorView& importance, int num_bits, const TensorView& scale,
                   const TensorView* zero_point, const ScaleSearch& search) {
  constexpr auto op = "search_scales";
  const cpu::SolveWeight w = solve::check_weight(op, weight, num_bits, scale, zero_point);
  const cpu::GridRule rule = solve::check_search(op, search, num_bits, zero_point == nullptr, scale.dtype);
  if (importance.rank != 3) {
    solve::check_importance(op, importance, w.columns);
    return cpu::search_scales({w, rule, importance.as<const float>(), nullptr});
  }
  const std::int64_t size = w.group_size();
  ops::check_dtype(op, "importance", importance, DType::f32);
  ops::check_cpu(op, importance);
  ops::check_contiguous(op, "importance", importance);
  if (importance.shape[0] != w.groups || importance.shape[1] != size || importance.shape[2] != size)
    fail_input("{}: importance has shape {}; expected [{}] or [{}, {}, {}].", op, ops::shape_text(importance),
               w.columns, w.groups, size, size);
  solve::check_finite(op, "importance", TensorView::matrix(importance.data, DType::f32, w.groups * size, size));
  cpu::search_scales({w, rule, nullptr, importance.as<const float>()});
}

}  // namespace qtale

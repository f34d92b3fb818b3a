#include <cmath>

#include "core/text.h"
#include "solve/check.h"

namespace qtale {
namespace {

void threshold(const char* op, const char* name, const TensorView& values, std::int64_t group_size, float step,
               const TensorView& out, bool project) {
  ops::check_matrix(op, "values", values, DType::f32);
  const std::int64_t rows = values.shape[0], in = values.shape[1];
  ops::check_shape(op, "out", out, DType::f32, rows, in);
  const std::int64_t size = solve::check_group_size(op, group_size, in);
  if (!(step >= 0.0f) || !std::isfinite(step))
    fail_input("{}: {} is {}; expected a number that is not negative.", op, name, step);
  cpu::prox_linf({values.as<const float>(), values.strides[0], out.as<float>(), in, size, step, project}, rows);
}

}  // namespace

void prox_linf(const TensorView& values, std::int64_t group_size, float step, const TensorView& out) {
  threshold("prox_linf", "step", values, group_size, step, out, false);
}

void project_l1(const TensorView& values, std::int64_t group_size, float radius, const TensorView& out) {
  threshold("project_l1", "radius", values, group_size, radius, out, true);
}

}  // namespace qtale

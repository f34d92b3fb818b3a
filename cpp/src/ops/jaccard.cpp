#include "core/text.h"
#include "cpu/backend.h"
#include "ops/check.h"
#include "qtale/ops.h"

namespace qtale {
namespace {

cpu::IndexRows rows_of(const char* name, const TensorView& t) {
  ops::check_matrix("jaccard", name, t, DType::s32);
  return {t.as<const std::int32_t>(), t.shape[1], t.strides[0]};
}

}  // namespace

void jaccard(const TensorView& a, const TensorView& b, const TensorView& out) {
  const cpu::IndexRows left = rows_of("a", a), right = rows_of("b", b);
  if (a.shape[0] != b.shape[0]) fail_input("jaccard: a has {} rows, b {}; both need the same.", a.shape[0], b.shape[0]);
  ops::check_dtype("jaccard", "out", out, DType::f64);
  if (out.rank != 1 || out.shape[0] != a.shape[0])
    fail_input("jaccard: out has shape {}; expected [{}].", ops::shape_text(out), a.shape[0]);
  ops::check_contiguous("jaccard", "out", out);
  ops::check_cpu("jaccard", out);
  cpu::jaccard(left, right, a.shape[0], out.as<double>());
}

}  // namespace qtale

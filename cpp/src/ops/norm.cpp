#include "core/text.h"
#include "cpu/decoder.h"
#include "ops/check.h"

namespace qtale {

void rms_norm(const TensorView& x, const TensorView& weight, float eps, const TensorView& out) {
  constexpr auto op = "rms_norm";
  ops::check_heads(op, "x", x);
  ops::check_heads(op, "out", out);
  if (out.rank != x.rank || out.shape != x.shape)
    fail_input("rms_norm: out has shape {}; expected that of x, {}.", ops::shape_text(out), ops::shape_text(x));
  const std::int64_t n = x.shape[x.rank - 1];
  ops::check_vector(op, "weight", weight, DType::f32, n);
  if (!(eps >= 0.0f)) fail_input("rms_norm: eps is {}; expected a number from 0.", eps);
  const bool has_heads = x.rank == 3;
  cpu::rms_norm({{x.as<const float>(), x.strides[0], x.strides[1]},
                 weight.as<const float>(),
                 eps,
                 {out.as<float>(), out.strides[0], out.strides[1]},
                 has_heads ? x.shape[1] : 1,
                 n},
                x.shape[0]);
}

}  // namespace qtale

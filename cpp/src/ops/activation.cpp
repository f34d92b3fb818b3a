#include "core/text.h"
#include "cpu/decoder.h"
#include "ops/check.h"

namespace qtale {

void silu_mul(const TensorView& gate_up, const TensorView& out) {
  constexpr auto op = "silu_mul";
  ops::check_heads(op, "gate_up", gate_up, 2);
  ops::check_heads(op, "out", out, 2);
  const std::int64_t rows = gate_up.shape[0], n = out.shape[1];
  if (out.shape[0] != rows || gate_up.shape[1] != 2 * n)
    fail_input("silu_mul: gate_up has shape {} and out {}; expected [rows, 2n] and [rows, n].",
               ops::shape_text(gate_up), ops::shape_text(out));
  cpu::silu_mul({gate_up.as<const float>(), gate_up.strides[0], n, out.as<float>(), out.strides[0]}, rows);
}

}  // namespace qtale

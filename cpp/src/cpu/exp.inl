// Powers of numbers that are not positive, all that softmax and sigmoid need, and silu, over the Vec of the including
// file.
#pragma once

namespace qtale::cpu {
namespace {

// x + kBias has x rounded to a whole number in its last bits, plus 127.
constexpr float kBias = 12582912.0f + 127.0f;

// 2^f for |f| <= 0.5: a minimax polynomial, within 1 unit in the last place.
inline VecF exp2_fraction(VecF f) {
  VecF sum = set1(1.53533620e-4f);
  for (const float coefficient : {1.33988750e-3f, 9.61843692e-3f, 5.55033237e-2f, 2.40226477e-1f, 6.93147182e-1f, 1.0f})
    sum = multiply_add(sum, f, set1(coefficient));
  return sum;
}

// 2^x for x <= 0; 0 where that is no normal float, also for -inf.
inline VecF exp2_down(VecF x) {
  const VecF biased = add(x, set1(kBias));
  const VecF f = sub(x, sub(biased, set1(kBias)));
  return scale_down(exp2_fraction(f), biased, x);
}

// e^x for x <= 0, within 2 units in the last place. ln 2 comes in two parts, of which the first has 16 bits.
inline VecF exp_down(VecF x) {
  const VecF power = mul(x, set1(1.44269504f));
  const VecF biased = add(power, set1(kBias));
  const VecF whole = sub(biased, set1(kBias));
  const VecF rest = multiply_add(whole, set1(-1.42860682e-6f), multiply_add(whole, set1(-0.693145752f), x));
  return scale_down(exp2_fraction(mul(rest, set1(1.44269504f))), biased, power);
}

inline VecF silu(VecF x) {
  const VecF e = exp_down(negated_abs(x)), one = set1(1.0f);
  return mul(x, div(where_negative(x, e, one), add(one, e)));
}

}  // namespace
}  // namespace qtale::cpu

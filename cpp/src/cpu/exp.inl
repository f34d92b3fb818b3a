// Powers of numbers that are not positive, all that softmax and sigmoid need, over the Vec of the including file.
#pragma once

namespace qtale::cpu {
namespace {

// 2^(n + f) for whole n <= 0 and |f| <= 0.5: a minimax polynomial, within 1.5 units in the last place.
inline VecF power_of_two(VecF n, VecF f) {
  VecF sum = set1(1.5353362e-4f);
  for (const float coefficient : {1.3398875e-3f, 9.6184369e-3f, 5.5503324e-2f, 2.4022648e-1f, 6.9314718e-1f, 1.0f}) {
    VecF next = set1(coefficient);
    accumulate(next, sum, f);
    sum = next;
  }
  return scale_down(sum, n);
}

// 2^x for x <= 0; below the range of floats it is 0, also for -inf.
inline VecF exp2_down(VecF x) {
  const VecF kept = max(set1(kLowestPower), x);
  const VecF n = rint(kept);
  return power_of_two(n, sub(kept, n));
}

// e^x for x <= 0, within 2 units in the last place. ln 2 comes in two parts, of which the first has 15 bits.
inline VecF exp_down(VecF x) {
  const VecF kept = max(set1(-138.0f), x);
  const VecF n = max(set1(kLowestPower), rint(mul(kept, set1(1.44269504f))));
  VecF rest = kept;
  accumulate(rest, n, set1(-0.693145752f));
  accumulate(rest, n, set1(-1.42860677e-6f));
  return power_of_two(n, mul(rest, set1(1.44269504f)));
}

}  // namespace
}  // namespace qtale::cpu

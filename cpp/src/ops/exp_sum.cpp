#include "ops/exp_sum.h"

#include <cmath>

#include "cpu/decoder.h"
#include "cpu/isa.h"

namespace qtale::ops {

double exp_sum(std::span<const float> x) {
  if (x.empty()) return 0.0;
  const cpu::ExpSum part = cpu::kernels().decoder->exp_sum(x.data(), std::ssize(x));
  // The kernel's powers are those of distances from the largest, which are no numbers where that is -inf.
  const float largest = std::exp(part.top);
  return largest > 0.0F ? part.sum * static_cast<double>(largest) : 0.0;
}

}  // namespace qtale::ops

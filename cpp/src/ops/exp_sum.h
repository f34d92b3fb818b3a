// Sums of powers over the kernels in use, for operators and for the sampler.
#pragma once

#include <span>

namespace qtale::ops {

// The sum of e^x over x <= 0, none of them NaN; what is below the smallest float counts as 0.
double exp_sum(std::span<const float> x);

}  // namespace qtale::ops

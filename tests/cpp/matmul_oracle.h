// qmatmul in float64 by its definition, and kernels run on panels as the operator would, but into guarded memory.
#pragma once

#include <string>
#include <vector>

#include "support.h"

namespace qtale::test {

// The modes of qmatmul.
inline constexpr Compute kModes[] = {Compute::int8, Compute::int16, Compute::floating};

// Activations in rows that lie `stride` apart; what is between them is NaN.
struct Activations {
  Activations(DType dtype, std::int64_t rows, std::int64_t k);
  void set(std::int64_t m, std::int64_t i, float value) { values.set(m * stride + i, value); }
  float get(std::int64_t m, std::int64_t i) const { return values.get(m * stride + i); }
  TensorView view(std::int64_t count) const;

  std::int64_t rows, k, stride;
  Floats values;
};

Activations normal_activations(Random& random, DType dtype, std::int64_t rows, std::int64_t k);

// Exact outputs [rows, n] and how far a kernel that sums in float32 may be from them.
struct Expected {
  std::int64_t n;
  std::vector<double> y, bound;
};
// With the rounding of activations that int8 mode defines, so that only float32 rounding remains; of int16 mode, whose
// codes differ between tiers, with the bound that ops.h states.
Expected expect(const Weight& weight, const Activations& x, Compute compute, const std::vector<float>& bias);
// Without it: the product that all modes approximate, and the bounds that ops.h states.
Expected expect_exact(const Weight& weight, const Activations& x, Compute compute);

// First output of y [rows, n] out of its bound, as a sentence; "" if there is none.
std::string compare(const Expected& expected, const Floats& y, std::int64_t rows, std::int64_t n);

// One product by one tier, its panels and rows cut into pieces; "" or what it wrote outside of y.
struct Product {
  Floats y;
  std::string overrun;
};
Product run_kernel(const cpu::KernelTable& table, Compute compute, const Panels& weight, const Activations& x,
                   std::int64_t rows, const std::vector<float>& bias, Random& random);

}  // namespace qtale::test

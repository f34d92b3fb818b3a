// Checks that the solvers share.
#pragma once

#include <string_view>

#include "cpu/solve.h"
#include "ops/check.h"
#include "qtale/solve.h"

namespace qtale::solve {

// Every value of a float32 matrix on the CPU, whose rows may be apart, is finite.
void check_finite(std::string_view op, std::string_view name, const TensorView& t);
// [n, n] float32 on the CPU, rows may be apart, finite.
void check_square(std::string_view op, std::string_view name, const TensorView& t, std::int64_t n);
// A permutation of [0, n) or nullptr; returns its data.
const std::int32_t* check_order(std::string_view op, const TensorView* order, std::int64_t n);
// [n] float32, finite and >= 0.
void check_importance(std::string_view op, const TensorView& t, std::int64_t n);
// The weight and its grid parameters.
cpu::SolveWeight check_weight(std::string_view op, const TensorView& weight, int num_bits, const TensorView& scale,
                              const TensorView* zero_point);
// Given scales are numbers other than 0 and given zero points codes.
void check_grids(std::string_view op, const cpu::SolveWeight& weight);
std::int8_t* check_codes_out(std::string_view op, const TensorView& codes, const cpu::SolveWeight& weight);
cpu::GridRule check_search(std::string_view op, const ScaleSearch& search, int num_bits, bool symmetric,
                           DType scale_dtype);
// A group size of `in` columns, 0 for all of them; returns it.
std::int64_t check_group_size(std::string_view op, std::int64_t group_size, std::int64_t in);

}  // namespace qtale::solve

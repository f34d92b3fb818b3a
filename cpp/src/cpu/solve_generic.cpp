// Plain C++ for every machine that has no tier of its own.
#include "cpu/vec_generic.h"

#include "cpu/solve_columns.inl"
#include "cpu/solve_prox.inl"

namespace qtale::cpu {

const SolveKernels generic_solve_table = solving::kernels<4, 1>;

}  // namespace qtale::cpu

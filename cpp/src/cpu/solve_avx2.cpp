// x86-64 with AVX2, FMA and F16C.
#include "cpu/vec_avx2.h"

#include "cpu/solve_columns.inl"
#include "cpu/solve_prox.inl"

namespace qtale::cpu {

const SolveKernels avx2_solve_table = solving::kernels<4, 3>;

}  // namespace qtale::cpu

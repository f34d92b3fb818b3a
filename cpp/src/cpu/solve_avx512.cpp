// x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
#include "cpu/vec_avx512.h"

#include "cpu/solve_columns.inl"
#include "cpu/solve_prox.inl"

namespace qtale::cpu {

const SolveKernels avx512_solve_table = solving::kernels<8, 3>;

}  // namespace qtale::cpu

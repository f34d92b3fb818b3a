// What BF16 adds to AVX-512: its own float qmatmul, and products of rounded numbers.
#include "cpu/vec_avx512.h"

#include "cpu/matmul_avx512_bf16.inl"
#include "cpu/project_bf16.inl"

namespace qtale::cpu {

const MatmulKernel avx512_bf16_float_table = {plane_rows_bytes, prepare_planes, run_planes, 5 * kMaxTile,
                                              18 * 5 * kMaxTile};  // tiles of 5 rows, too
const ProjectKernel avx512_bf16_project_table = projection::bf16_kernel;

}  // namespace qtale::cpu

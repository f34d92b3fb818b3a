// x86-64 with AVX2, FMA and F16C.
#include "cpu/vec_avx2.h"

#include "cpu/matmul_avx2.inl"
#include "cpu/project.inl"
#include "cpu/quantize.inl"
#include "cpu/routed_rows.inl"
#include "cpu/solve.h"

namespace qtale::cpu {

constexpr MatmulKernel kInt16 = {acts_bytes<Compute::int16>, prepare_acts<Compute::int16>, run_rows<Compute::int16>,
                                 kTile, 2 * kRowBlock};

const KernelTable avx2_table = {
    "avx2",
    kRows,
    quantize_rows,
    dequantize_rows,
    fake_quantize_rows,
    {acts_bytes<Compute::int8>, prepare_acts<Compute::int8>, run_rows<Compute::int8>, kTile, 2 * kRowBlock},
    &kInt16,
    {acts_bytes<Compute::floating>, prepare_acts<Compute::floating>, run_rows<Compute::floating>, kTile, 2 * kRowBlock},
    projection::kernel<6, 2>,
    nullptr,
    jaccard_by_sorting,
    compact,
    scatter_add,
    &avx2_decoder_table,
    &avx2_solve_table,
};

}  // namespace qtale::cpu

// Plain C++ for every machine that has no tier of its own.
#include "cpu/vec_generic.h"

#include "cpu/matmul_generic.inl"
#include "cpu/project.inl"
#include "cpu/quantize.inl"
#include "cpu/routed_rows.inl"
#include "cpu/solve.h"

namespace qtale::cpu {

constexpr MatmulKernel kInt16 = {int8_rows_bytes<2>, prepare_int8_rows<2>, run_int8<2>, 1, 264};

const KernelTable generic_table = {
    "generic",
    kRows,
    quantize_rows,
    dequantize_rows,
    fake_quantize_rows,
    {int8_rows_bytes<1>, prepare_int8_rows<1>, run_int8<1>, 1, 264},
    &kInt16,
    {float_bytes, prepare_float, run_float, 1, 264},
    projection::kernel<4, 1>,
    nullptr,
    jaccard_by_sorting,
    compact,
    scatter_add,
    &generic_decoder_table,
    &generic_solve_table,
};

}  // namespace qtale::cpu

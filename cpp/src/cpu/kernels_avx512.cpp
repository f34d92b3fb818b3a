// x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
#include "cpu/vec_avx512.h"

#include "cpu/matmul_avx512.inl"
#include "cpu/matmul_avx512_float.inl"
#include "cpu/project.inl"
#include "cpu/quantize.inl"
#include "cpu/routed_rows.inl"
#include "cpu/solve.h"

namespace qtale::cpu {

const KernelTable avx512_table = {
    "avx512",
    kRows,
    quantize_rows,
    dequantize_rows,
    fake_quantize_rows,
    {int8_rows_bytes<1>, prepare_int8_rows<1>, run_int8<1>, kMaxTile, 88 * kMaxTile},
    &avx512_int16_table,
    {float_rows_bytes, prepare_float_positions, run_float, kFloatTile, 66 * kFloatTile},
    projection::kernel<12, 2>,
    nullptr,
    jaccard_by_sorting,
    compact,
    scatter_add,
    &avx512_decoder_table,
    &avx512_solve_table,
};

}  // namespace qtale::cpu

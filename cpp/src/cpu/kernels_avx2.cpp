// x86-64 with AVX2, FMA and F16C.
#include "cpu/vec_avx2.h"

#include "cpu/matmul_generic.inl"

namespace qtale::cpu {

const KernelTable avx2_table = {
    "avx2",
    kRows,
    quantize_rows,
    dequantize_rows,
    fake_quantize_rows,
    {int8_rows_bytes, prepare_int8_rows, run_int8, 1},
    {float_bytes, prepare_float, run_float, 1},
};

}  // namespace qtale::cpu

// x86-64 with AVX2, FMA and F16C.
#include "cpu/vec_avx2.h"

#include "cpu/matmul_avx2_float.inl"
#include "cpu/matmul_avx2_int8.inl"

namespace qtale::cpu {

const KernelTable avx2_table = {
    "avx2",
    kRows,
    quantize_rows,
    dequantize_rows,
    fake_quantize_rows,
    {int8_acts_bytes, prepare_int8_acts, run_tiles<Int8Mode>, kTile},
    {float_acts_bytes, prepare_float_acts, run_tiles<FloatMode>, kTile},
};

}  // namespace qtale::cpu

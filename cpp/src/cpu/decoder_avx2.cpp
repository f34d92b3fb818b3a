// x86-64 with AVX2, FMA and F16C.
#include "cpu/vec_avx2.h"

#include "cpu/attention_int16.inl"
#include "cpu/decoder_rows.inl"

namespace qtale::cpu {

const DecoderKernels avx2_decoder_table = {
    rms_norm_rows,
    rope_rows,
    silu_mul_rows,
    exp_sum_of,
    append_units,
    attending::kernel<6, 2>,
    {attending::coded_kernel<6, 2>, nullptr},
};

}  // namespace qtale::cpu

// x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
#include "cpu/vec_avx512.h"

#include "cpu/attention.inl"
#include "cpu/decoder_rows.inl"

namespace qtale::cpu {

const DecoderKernels avx512_decoder_table = {
    rms_norm_rows,
    rope_rows,
    silu_mul_rows,
    exp_sum_of,
    append_units,
    attending::kernel<6, 4>,
    {attending::kernel<6, 4>, nullptr},
};

}  // namespace qtale::cpu

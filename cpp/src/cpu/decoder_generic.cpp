// Plain C++ for every machine that has no tier of its own.
#include "cpu/vec_generic.h"

#include "cpu/attention.inl"
#include "cpu/decoder_rows.inl"

namespace qtale::cpu {

const DecoderKernels generic_decoder_table = {
    rms_norm_rows,
    rope_rows,
    silu_mul_rows,
    exp_sum_of,
    append_units,
    attending::kernel<4, 1>,
    {attending::kernel<4, 1>, nullptr},
};

}  // namespace qtale::cpu

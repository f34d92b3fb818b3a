// What BF16 adds to AVX-512: attention of rounded numbers.
#include "cpu/vec_avx512.h"

#include "cpu/attention_bf16.inl"

namespace qtale::cpu {

const RoundedKernels avx512_bf16_rounded_table = {attending::rounded_kernel, append_int8_keys};

}  // namespace qtale::cpu

// What BF16 adds to AVX-512: attention of rounded numbers.
#include "cpu/vec_avx512.h"

#include "cpu/attention_bf16.inl"

namespace qtale::cpu {

const AttentionKernel avx512_bf16_attention_table = attending::rounded_kernel;

}  // namespace qtale::cpu

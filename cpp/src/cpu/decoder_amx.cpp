// What AMX adds to AVX-512 BF16: attention in tiles.
#include "cpu/vec_avx512.h"

#include "cpu/attention_amx.inl"

namespace qtale::cpu {

const AttentionKernel avx512_amx_attention = attending::tile_kernel;

}  // namespace qtale::cpu

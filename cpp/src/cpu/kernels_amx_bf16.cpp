// What AMX adds to the products of bf16 numbers: those of attention, of matrices in tiles and of a matrix with itself.
#include "cpu/vec_avx512.h"

#include "cpu/attention_amx.inl"
#include "cpu/gram_amx.inl"
#include "cpu/project_amx.inl"

namespace qtale::cpu {

const AttentionKernel avx512_amx_attention_table = attending::amx_kernel;
const ProjectKernel avx512_amx_project_table = projection::amx_kernel;
const GramKernel avx512_amx_gram_table = gram::amx_kernel;

}  // namespace qtale::cpu

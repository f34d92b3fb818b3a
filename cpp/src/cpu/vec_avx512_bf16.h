// Pairs of bf16 numbers in the 32-bit lanes of one AVX-512 register. Internal linkage, as every file compiled for a
// newer CPU.
#pragma once

#include "cpu/unroll.h"
#include "cpu/vec_avx512.h"

namespace qtale::cpu {
namespace {

using Pairs = __m512bh;

// sum += both products of each pair. Spelled out for the reason that accumulate() is.
QTALE_INLINE void accumulate_pairs(VecF& sum, Pairs a, Pairs b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

}  // namespace
}  // namespace qtale::cpu

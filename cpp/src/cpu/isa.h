// Which instruction sets there are, and which table of kernels is in use.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace qtale::cpu {

// Tables of this build that this CPU can run, worst first. avx512 means F, BW, DQ, VL and VNNI,
// avx512_bf16 those and BF16, avx512_amx also AMX's tiles of bytes and of bf16 numbers.
const std::vector<const KernelTable*>& available_tables();
// The table in use.
const KernelTable& kernels();

}  // namespace qtale::cpu

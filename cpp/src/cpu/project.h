// What project_topk and matmul share.
#pragma once

#include <cstdint>

#include "core/integers.h"
#include "cpu/kernels.h"

namespace qtale::cpu {

// Rows of x that one pass over the matrix takes, in whole tiles: bounds the memory.
std::int64_t rows_per_pass(const ProjectKernel& kernel, std::int64_t rows);

// The pack step over all threads.
void pack_rows(const ProjectKernel& kernel, const ProjectArgs& args);

}  // namespace qtale::cpu

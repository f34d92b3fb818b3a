// The int16 qmatmul on AVX-512: a file of its own, because compilers take minutes for all forms of its tiles.
#include "cpu/vec_avx512.h"

#include "cpu/matmul_avx512.inl"

namespace qtale::cpu {

const MatmulKernel avx512_int16_table = {int8_rows_bytes<2>, prepare_int8_rows<2>, run_int8<2>, kMaxTile,
                                         44 * kMaxTile};

}  // namespace qtale::cpu

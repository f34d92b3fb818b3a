// The int16 qmatmul on AMX: a file of its own, because compilers take minutes for all forms of its tiles.
#define QTALE_FAR_MEMORY
#include "cpu/vec_avx512.h"

#include "cpu/matmul_amx.inl"

namespace qtale::cpu {

const MatmulKernel avx512_amx_int16_table = {amx_rows_bytes<2>, prepare_amx_rows<2>, run_amx<2>,
                                             kTileRows,         16 * kTileRows,      AmxRun<2>::scratch_bytes};

}  // namespace qtale::cpu

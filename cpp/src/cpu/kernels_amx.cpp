// What AMX adds to AVX-512: the int8 qmatmul of many rows. That of few rows is here once more, because the
// servers that have AMX have memory far away.
#define QTALE_FAR_MEMORY
#include "cpu/vec_avx512.h"

#include "cpu/matmul_amx.inl"

namespace qtale::cpu {

const MatmulKernel avx512_amx_int8_table = {amx_rows_bytes<1>, prepare_amx_rows<1>, run_amx<1>,
                                            kTileRows,         32 * kTileRows,      AmxRun<1>::scratch_bytes};

}  // namespace qtale::cpu

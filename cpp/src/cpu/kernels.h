// The table of kernels of one instruction set. Kernels get checked arguments, do no threading and allocate nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/decoder.h"
#include "cpu/layout.h"
#include "qtale/dtype.h"

namespace qtale::cpu {

// A float matrix in rows.
struct RowsIn {
  const void* data;
  DType dtype;
  std::int64_t stride;  // elements from row to row
};
struct RowsOut {
  void* data;
  DType dtype;
  std::int64_t stride;
};

struct QuantizeArgs {
  RowsIn weight;
  std::int64_t in_features;
  std::int64_t group_size;  // in_features for per channel
  std::int64_t groups;
  int num_bits;
  std::int8_t* codes;  // [rows, in_features]
  void* scale;         // [rows, groups]
  DType scale_dtype;
  std::int8_t* zero_point;  // [rows, groups] or nullptr
};

struct DequantizeArgs {
  const std::int8_t* codes;
  const void* scale;
  DType scale_dtype;
  const std::int8_t* zero_point;  // or nullptr
  std::int64_t in_features;
  std::int64_t group_size;
  std::int64_t groups;
  RowsOut out;
};

struct FakeQuantizeArgs {
  RowsIn x;
  const void* scale;
  DType scale_dtype;
  const std::int8_t* zero_point;  // or nullptr
  std::int64_t in_features;
  std::int64_t group_size;
  std::int64_t groups;
  int num_bits;
  RowsOut out;
};

// One qmatmul. `workspace` holds the activations as the kernel's own prepare step left them.
struct MatmulArgs {
  const Layout* layout;
  const std::uint8_t* panels;
  std::int64_t rows;
  RowsIn x;
  std::byte* workspace;  // 64-byte aligned
  const float* bias;     // [n] or nullptr
  RowsOut y;
  std::byte* scratch = nullptr;  // of the calling thread, 64-byte aligned, where the kernel wants some
};

struct MatmulKernel {
  std::size_t (*workspace_bytes)(const Layout&, std::int64_t rows);
  // Fills the workspace for rows [begin, end); begin is a multiple of row_tile.
  void (*prepare)(const MatmulArgs&, std::int64_t begin, std::int64_t end);
  // Panels [panel_begin, panel_end) x rows [row_begin, row_end); row_begin is a multiple of row_tile.
  void (*run)(const MatmulArgs&, std::int64_t panel_begin, std::int64_t panel_end, std::int64_t row_begin,
              std::int64_t row_end);
  std::int64_t row_tile;
  std::int64_t row_block;  // rows that best share one pass over the weights; a multiple of row_tile
  // Bytes of scratch that run wants for a block of so many rows; nullptr: none.
  std::size_t (*scratch_bytes)(const Layout&, std::int64_t rows) = nullptr;
};

// One project_topk or matmul: rows of x times the entries of a matrix.
struct ProjectArgs {
  RowsIn x;  // float32, or bf16 for kernels that have tiles
  std::int64_t rows;
  std::int64_t depth;  // of both
  std::byte* packed;   // x as the kernel's own pack step left it; 64-byte aligned
  RowsIn matrix;
  RowsIn up{};         // where it has data, silu(x matrix) * (x up) is stored
  bool tiled = false;  // whether both lie as tiles, see RoundArgs
};

// A matrix that is rounded to bf16 as its products would: in rows, or in tiles [entries / 16][depth / 32] of
// [16 pairs][16 entries], in which entry e begins at out + e * depth where 16 divides e.
struct RoundArgs {
  RowsIn matrix;
  std::int64_t depth;
  std::uint16_t* out;
  bool tiled;
};

struct Candidates;  // cpu/topk.h
struct ProjectOut {
  float* y;  // [rows, entries]
  std::int64_t stride;
  const float* bias;                 // [entries] or nullptr
  std::uint16_t* rounded = nullptr;  // of a gated product, in place of y: the same as bf16
  bool adds = false;                 // to what y holds, without a bias
};

struct ProjectKernel {
  std::size_t (*packed_bytes)(std::int64_t rows, std::int64_t depth);
  // Rows [begin, end); begin is a multiple of row_tile.
  void (*pack)(const ProjectArgs&, std::int64_t begin, std::int64_t end);
  std::size_t (*scratch_bytes)(std::int64_t rows);
  // Offers the products of all rows with entries [begin, end); nullptr where they are only stored.
  void (*find)(const ProjectArgs&, std::int64_t begin, std::int64_t end, std::byte* scratch, Candidates&);
  // Stores them. A product depends on its row and its entry alone, bit for bit.
  void (*store)(const ProjectArgs&, std::int64_t begin, std::int64_t end, std::byte* scratch, const ProjectOut&);
  std::int64_t row_tile;
  std::int64_t entry_tile;   // entries that share one pass over x
  std::int64_t entry_group;  // entries that are multiplied at once
  // Whether products are made in tiles: x may be bf16, the matrix may lie as tiles, and with more rows than row_tile
  // there may be `up`, or products may be added.
  bool tiles = false;
  // Rounds entries [begin, end), whole tiles of them; nullptr where products are of float32.
  void (*round)(const RoundArgs&, std::int64_t begin, std::int64_t end) = nullptr;
};

// Rows [rows, size] that routed execution moves; `indices` are checked.
struct CompactArgs {
  RowsIn x;
  const std::int32_t* indices;
  std::int64_t size;
  float* out;
  std::int64_t stride;  // of out
};
struct ScatterArgs {
  const float* delta;
  std::int64_t delta_stride;
  const std::int32_t* indices;
  const float* gates;  // or nullptr
  std::int64_t size;
  float* x;
  std::int64_t stride;  // of x
};

// Jaccard coefficient of two rows of indices; `scratch` holds a_size + b_size of them.
using JaccardKernel = double (*)(const std::int32_t* a, std::int64_t a_size, const std::int32_t* b, std::int64_t b_size,
                                 std::int32_t* scratch);
double jaccard_by_sorting(const std::int32_t* a, std::int64_t a_size, const std::int32_t* b, std::int64_t b_size,
                          std::int32_t* scratch);

struct SolveKernels;  // cpu/solve.h

// Sums of products of columns of bf16 numbers. Panels hold zeros beyond the rows and columns that there are.
struct GramKernel {
  std::int64_t width;     // columns of a panel, which takes width / 2 floats a row
  std::int64_t row_step;  // the rows of a panel are a multiple of it
  // At most `width` columns of `rows` rows to panels of either kind.
  void (*pack)(const std::uint16_t* x, std::int64_t stride, std::int64_t rows, std::int64_t columns, float* lanes,
               float* entries);
  // sums[i][j] = sum_r entries[r][i] * lanes[r][j], [width][width].
  void (*sums)(const float* lanes, const float* entries, std::int64_t rows, float* sums);
};

struct KernelTable {
  const char* name;
  int panel_rows;
  // Row in [begin, end) that holds NaN, inf or a value whose scale overflows its dtype, or -1.
  std::int64_t (*quantize)(const QuantizeArgs&, std::int64_t begin, std::int64_t end);
  void (*dequantize)(const DequantizeArgs&, std::int64_t begin, std::int64_t end);
  void (*fake_quantize)(const FakeQuantizeArgs&, std::int64_t begin, std::int64_t end);
  MatmulKernel int8;
  const MatmulKernel* int16;
  MatmulKernel floating;
  ProjectKernel project;
  const ProjectKernel* bf16_project;  // of Compute::bfloat16, in numbers by pairs; nullptr where the CPU has none
  JaccardKernel jaccard;
  // Rows [begin, end) of the indices.
  void (*compact_rows)(const CompactArgs&, std::int64_t begin, std::int64_t end);
  void (*scatter_add_rows)(const ScatterArgs&, std::int64_t begin, std::int64_t end);
  const DecoderKernels* decoder;
  const SolveKernels* solve;
  const GramKernel* bf16_gram = nullptr;  // where the CPU has one that is faster than float32
  bool tiles = false;  // whether products of many rows are made in tiles, of which activations have a form of their own
};

// Scalar: the specification of every kernel and the oracle of the tests. Reads the 16-row layout.
extern const KernelTable reference_table;
extern const KernelTable generic_table;
#ifdef QTALE_X86
extern const KernelTable avx2_table;
extern const KernelTable avx512_table;
extern const MatmulKernel avx512_bf16_float_table;  // in place of the float one where the CPU has BF16, but no AMX
extern const ProjectKernel avx512_bf16_project_table;
extern const MatmulKernel avx512_int16_table;
extern const MatmulKernel avx512_amx_int8_table;  // in place of these where the CPU has AMX
extern const MatmulKernel avx512_amx_int16_table;
extern const ProjectKernel avx512_amx_project_table;
extern const GramKernel avx512_amx_gram_table;
#endif

}  // namespace qtale::cpu

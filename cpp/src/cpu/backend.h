// What the operators call on the CPU, with checked arguments: these choose kernels, split work and own scratch memory.
#pragma once

#include "cpu/kernels.h"
#include "qtale/ops.h"

namespace qtale::cpu {

// Throws InputError naming the row that cannot be quantized.
void quantize(const QuantizeArgs& args, std::int64_t rows);
void dequantize(const DequantizeArgs& args, std::int64_t rows);
void fake_quantize(const FakeQuantizeArgs& args, std::int64_t rows);

void pack(const std::int8_t* codes, std::int64_t rows, std::int64_t cols, int num_bits, std::int32_t* packed);
void unpack(const std::int32_t* packed, std::int64_t rows, std::int64_t cols, int num_bits, std::int8_t* codes);

std::int64_t prepacked_bytes(const PrepackedInfo& info);
void prepack(const PrepackedInfo& info, const std::int8_t* codes, const void* scale, const std::int8_t* zero_point,
             std::uint8_t* buffer);
PrepackedInfo prepacked_info(const std::uint8_t* buffer, std::int64_t bytes);
void unprepack(const std::uint8_t* buffer, std::int64_t bytes, std::int8_t* codes, void* scale,
               std::int8_t* zero_point);
struct PrepackedBuffer {
  const std::uint8_t* data;
  std::int64_t bytes;
};
// One weight of several that multiply the same x; y [rows, out_features], bias [out_features] float32 or nullptr.
struct QmatmulPart {
  PrepackedBuffer weight;
  const float* bias;
  RowsOut y;
};
// x [rows, in_features]; next: the weights of the product that follows, of which threads that wait bring parts near.
void qmatmul(std::span<const QmatmulPart> parts, std::int64_t rows, const RowsIn& x, Compute compute,
             std::span<const PrepackedBuffer> next);

// values and indices [rows, k]; throws InputError naming the first row whose products hold NaN.
void project_topk(const RowsIn& x, std::int64_t rows, std::int64_t depth, const RowsIn& matrix, std::int64_t entries,
                  std::int64_t k, float* values, std::int32_t* indices);
// out [rows, entries] = x [rows, depth] times a matrix; with `up`, or added to y, only where has_fused_products(), see
// ProjectArgs.
struct DenseProduct {
  RowsIn x;
  std::int64_t rows;
  std::int64_t depth;
  RowsIn matrix;
  RowsIn up;
  std::int64_t entries;
  ProjectOut out;
  bool tiled = false;
};
bool has_fused_products(Compute compute, std::int64_t rows);
// Throws InputError where the kernels in use lack the mode.
void matmul(const DenseProduct& product, Compute compute);
void round_weights(const RoundArgs& args, std::int64_t entries);
void compact_rows(const CompactArgs& args, std::int64_t count);
void scatter_add_rows(const ScatterArgs& args, std::int64_t count);
// a [rows, a_size] and b [rows, b_size] with contiguous rows.
struct IndexRows {
  const std::int32_t* data;
  std::int64_t size;
  std::int64_t stride;
};
void jaccard(const IndexRows& a, const IndexRows& b, std::int64_t rows, double* out);

}  // namespace qtale::cpu

// Checks that the operators share; every failure is a sentence that names the operator and the value.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "qtale/tensor.h"

namespace qtale::ops {

std::string shape_text(const TensorView& t);

void check_bits(std::string_view op, int num_bits);
void check_dtype(std::string_view op, std::string_view name, const TensorView& t, DType dtype);
void check_float(std::string_view op, std::string_view name, const TensorView& t);
// A matrix whose rows are contiguous; rows themselves may be apart (strides[1] == 1).
void check_matrix(std::string_view op, std::string_view name, const TensorView& t);
// Such a matrix on the CPU, of one dtype.
void check_matrix(std::string_view op, std::string_view name, const TensorView& t, DType dtype);
// Such a matrix on the CPU, of float32, float16 or bfloat16.
void check_float_matrix(std::string_view op, std::string_view name, const TensorView& t);
// Weights in tiles on the CPU, see decoder_ops.h.
void check_tiles(std::string_view op, std::string_view name, const TensorView& t);
// Float32 on the CPU of `rank` dimensions (0: two or three) of which the last is contiguous.
void check_heads(std::string_view op, std::string_view name, const TensorView& t, int rank = 0);
// [size] on the CPU, contiguous.
void check_vector(std::string_view op, std::string_view name, const TensorView& t, DType dtype, std::int64_t size);
void check_shape(std::string_view op, std::string_view name, const TensorView& t, std::int64_t rows, std::int64_t cols);
// [rows, cols] on the CPU, contiguous, of one dtype.
void check_shape(std::string_view op, std::string_view name, const TensorView& t, DType dtype, std::int64_t rows,
                 std::int64_t cols);
void check_contiguous(std::string_view op, std::string_view name, const TensorView& t);
void check_cpu(std::string_view op, const TensorView& t);
// Contiguous int8 codes on the CPU, all in [-2^(b-1), 2^(b-1)-1].
void check_codes(std::string_view op, const TensorView& codes, int num_bits, std::string_view name = "code");
// Scales [out, groups] and optional zero points of a weight [out, in]; returns groups.
std::int64_t check_params(std::string_view op, std::int64_t out, std::int64_t in, const TensorView& scale,
                          const TensorView* zero_point);

}  // namespace qtale::ops

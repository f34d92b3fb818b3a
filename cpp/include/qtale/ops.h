// The operators. Each one checks its arguments (InputError) and dispatches by device; docs name shapes and bounds.
#pragma once

#include <cstdint>
#include <span>

#include "qtale/tensor.h"

namespace qtale {

// How products are made. qmatmul has three ways:
//   int8:  activations are rounded to 8 bits per row and group of 128 inputs:
//          |y - y_exact| <= sum_k |w_k| * s(k) / 2 with s = amax(group) / 127, plus float32 rounding.
//   int16: likewise to 16 bits, in two codes of 8, of which the second holds what the first left over:
//          |y - y_exact| <= sum_k |w_k| * s(k) / 2 with s = max(amax(group) / 32258, 2^-118), plus float32
//          rounding as in float mode.
//   float: activations as they are up to the 17th significant bit, products of unsigned codes summed in float32:
//          |y - y_exact| <= (in + 56) * 2^-24 * sum_k (|code_k| + |zero_point| + 2^b) * scale * max(|x_k|, 2^-96).
//          float32 activations are exact but for two cases: weights below 8 bits meet them as sums of two bf16 numbers
//          with the kernels of AVX-512 BF16; AVX2 keeps them to 2^-24 of the largest of 128, and a row with inf or NaN
//          becomes NaN.
//   bfloat16 is for weights that are not quantized, see matmul; qmatmul takes it for float, as matmul takes int8 and
//   int16.
// In all modes a row of y depends on its row of x alone, bit for bit.
// Rounding to the dtype of y comes on top.
enum class Compute : std::uint8_t { int8, int16, floating, bfloat16 };
// Whether attention and routers may round to bfloat16, too.
constexpr bool rounds_to_bfloat16(Compute compute) { return compute == Compute::int8 || compute == Compute::bfloat16; }

// Round to nearest, ties to even: codes[o,i] in [-2^(b-1), 2^(b-1)-1], weight ~ (code - zero_point) * scale.
//   weight [out, in] f32|f16|bf16; codes [out, in] s8; scale [out, groups] f32|f16|bf16; zero_point [out, groups] s8.
// With zero_point == nullptr symmetric: scale = amax / ((2^b - 1) / 2); else scale = (max - min) / (2^b - 1) over a
// range that includes 0. The scale is rounded to its dtype before codes are made. NaN and inf are refused.
void quantize(const TensorView& weight, int num_bits, const TensorView& codes, const TensorView& scale,
              const TensorView* zero_point);

// out[o,i] = (codes[o,i] - zero_point[o,g]) * scale[o,g];  out [out, in] f32|f16|bf16.
void dequantize(const TensorView& codes, const TensorView& scale, const TensorView* zero_point, const TensorView& out);

// out = dequantize(clamp(round(x / scale) + zero_point)) with given parameters; x and out of one dtype.
void fake_quantize(const TensorView& x, const TensorView& scale, const TensorView* zero_point, int num_bits,
                   const TensorView& out);

// compressed-tensors' `pack-quantized`: each row a little-endian stream of (code + 2^(b-1)), b bits each.
//   codes [rows, cols] s8; packed [rows, ceil(cols * b / 32)] s32.
void pack(const TensorView& codes, int num_bits, const TensorView& packed);
void unpack(const TensorView& packed, int num_bits, const TensorView& codes);

// What a prepacked buffer says of itself.
struct PrepackedInfo {
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;
  std::int64_t groups = 1;
  int num_bits = 0;
  bool symmetric = true;
  DType scale_dtype = DType::f32;
};

// Bytes of the layout that the CPU kernels in use read.
std::int64_t prepacked_bytes(const PrepackedInfo& info);
// codes [out, in] s8, scale [out, groups], zero_point [out, groups] s8 or nullptr -> buffer [prepacked_bytes] u8.
// Groups are multiples of 32 inputs, or one per row. Codes and zero points are in
// [-2^(num_bits - 1), 2^(num_bits - 1)).
void prepack(const TensorView& codes, const TensorView& scale, const TensorView* zero_point, int num_bits,
             const TensorView& buffer);
// Reads and checks the header of a prepacked buffer.
PrepackedInfo prepacked_info(const TensorView& buffer);
// The exact inverse of prepack.
void unprepack(const TensorView& buffer, const TensorView& codes, const TensorView& scale,
               const TensorView* zero_point);

// y[m,o] = sum_i x[m,i] * weight[o,i] + bias[o];  x [m, in] and y [m, out] alike in f32|f16|bf16, rows of both may be
// apart; bias [out] f32.
void qmatmul(const TensorView& x, const TensorView& prepacked, const TensorView* bias, const TensorView& y,
             Compute compute);

// The same for several weights that read one x, as queries, keys and values do: its activations are prepared once, and
// threads meet once. The results have the bits of single calls. next: prepacked weights of the product that follows;
// threads that wait bring parts of them near.
struct QmatmulWeight {
  TensorView prepacked;
  const TensorView* bias;
  TensorView y;
};
void qmatmul(const TensorView& x, std::span<const QmatmulWeight> weights, Compute compute,
             std::span<const TensorView> next = {});

// The k largest of x[r] . matrix[e] over the entries e of a vocabulary, without storing the products.
//   x [rows, depth] f32; matrix [entries, depth] f32|f16|bf16, its rows may be apart; values [rows, k] f32, descending;
//   indices [rows, k] s32; of equal values the smaller index comes first. 1 <= k <= entries.
//   |value - exact| <= (depth + 8) * 2^-24 * sum_i |x_i * matrix_i|. A value does not depend on threads. NaN is
//   refused.
void project_topk(const TensorView& x, const TensorView& matrix, const TensorView& values, const TensorView& indices);

// |A n B| / |A u B| of two sets of indices per row, 1 where both are empty.
//   a [rows, ka] and b [rows, kb] s32: what stands twice in a row counts once; out [rows] f64.
void jaccard(const TensorView& a, const TensorView& b, const TensorView& out);

}  // namespace qtale

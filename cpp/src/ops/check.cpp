#include "ops/check.h"

#include <algorithm>
#include <atomic>

#include "core/text.h"
#include "qtale/decoder_ops.h"
#include "qtale/parallel.h"

namespace qtale::ops {

std::string shape_text(const TensorView& t) {
  std::string text = "[";
  for (int d = 0; d < t.rank; ++d) text += (d ? ", " : "") + std::to_string(t.shape[d]);
  return text + "]";
}

void check_bits(std::string_view op, int num_bits) {
  if (num_bits != 2 && num_bits != 3 && num_bits != 4 && num_bits != 8)
    fail_input("{}: num_bits {} is not supported; use 2, 3, 4 or 8.", op, num_bits);
}

void check_dtype(std::string_view op, std::string_view name, const TensorView& t, DType dtype) {
  if (t.dtype != dtype) fail_input("{}: {} is {}; expected {}.", op, name, name_of(t.dtype), name_of(dtype));
}

void check_float(std::string_view op, std::string_view name, const TensorView& t) {
  if (!is_float(t.dtype))
    fail_input("{}: {} is {}; expected float32, float16 or bfloat16.", op, name, name_of(t.dtype));
}

void check_matrix(std::string_view op, std::string_view name, const TensorView& t) {
  if (t.rank != 2) fail_input("{}: {} has shape {}; expected a matrix.", op, name, shape_text(t));
  if (t.shape[1] > 1 && t.strides[1] != 1)
    fail_input("{}: the rows of {} are not contiguous (stride {}); call .contiguous() first.", op, name, t.strides[1]);
}

void check_matrix(std::string_view op, std::string_view name, const TensorView& t, DType dtype) {
  check_dtype(op, name, t, dtype);
  check_matrix(op, name, t);
  check_cpu(op, t);
}

void check_float_matrix(std::string_view op, std::string_view name, const TensorView& t) {
  check_float(op, name, t);
  check_matrix(op, name, t);
  check_cpu(op, t);
}

void check_tiles(std::string_view op, std::string_view name, const TensorView& t) {
  check_dtype(op, name, t, DType::bf16);
  check_cpu(op, t);
  if (t.rank != 4 || t.shape[1] < 1 || t.shape[2] != kTileOutputs || t.shape[3] != kTileInputs)
    fail_input("{}: {} has shape {}; expected tiles [out / 16, in / 32, 16, 32] of some inputs.", op, name,
               shape_text(t));
  check_contiguous(op, name, t);
}

void check_heads(std::string_view op, std::string_view name, const TensorView& t, int rank) {
  check_dtype(op, name, t, DType::f32);
  check_cpu(op, t);
  if (rank == 0 ? t.rank != 2 && t.rank != 3 : t.rank != rank)
    fail_input("{}: {} has shape {}; expected {} dimensions.", op, name, shape_text(t),
               rank == 0 ? "2 or 3" : std::to_string(rank));
  if (t.shape[t.rank - 1] > 1 && t.strides[t.rank - 1] != 1)
    fail_input("{}: the last dimension of {} is not contiguous (stride {}); call .contiguous() first.", op, name,
               t.strides[t.rank - 1]);
}

void check_vector(std::string_view op, std::string_view name, const TensorView& t, DType dtype, std::int64_t size) {
  check_dtype(op, name, t, dtype);
  check_cpu(op, t);
  if (t.rank != 1 || t.shape[0] != size)
    fail_input("{}: {} has shape {}; expected [{}].", op, name, shape_text(t), size);
  check_contiguous(op, name, t);
}

void check_shape(std::string_view op, std::string_view name, const TensorView& t, std::int64_t rows,
                 std::int64_t cols) {
  if (t.rank != 2 || t.shape[0] != rows || t.shape[1] != cols)
    fail_input("{}: {} has shape {}; expected [{}, {}].", op, name, shape_text(t), rows, cols);
  check_contiguous(op, name, t);
}

void check_shape(std::string_view op, std::string_view name, const TensorView& t, DType dtype, std::int64_t rows,
                 std::int64_t cols) {
  check_dtype(op, name, t, dtype);
  check_shape(op, name, t, rows, cols);
  check_cpu(op, t);
}

void check_contiguous(std::string_view op, std::string_view name, const TensorView& t) {
  if (!t.is_contiguous()) fail_input("{}: {} is not contiguous; call .contiguous() first.", op, name);
}

void check_cpu(std::string_view op, const TensorView& t) {
  if (t.device.type != DeviceType::cpu)
    fail_input("{}: the tensor is on a CUDA device, but {}; move it to the CPU.", op, cuda_reason());
}

void check_codes(std::string_view op, const TensorView& codes, int num_bits, std::string_view name) {
  constexpr std::int64_t kGrain = 1 << 20;
  const auto* data = codes.as<const std::int8_t>();
  const int half = 1 << (num_bits - 1);
  std::atomic<bool> outside{false};
  parallel_for(codes.numel(), kGrain, [&](std::int64_t begin, std::int64_t end) {
    unsigned seen = 0;
    for (std::int64_t i = begin; i < end; ++i) seen |= static_cast<unsigned>(data[i] + half);
    if (seen >> num_bits) outside = true;
  });
  if (!outside) return;
  const auto* bad = std::find_if(data, data + codes.numel(), [&](int code) { return code < -half || code >= half; });
  fail_input("{}: {} {} does not fit {} bits; expected {} to {}.", op, name, *bad, num_bits, -half, half - 1);
}

std::int64_t check_params(std::string_view op, std::int64_t out, std::int64_t in, const TensorView& scale,
                          const TensorView* zero_point) {
  check_float(op, "scale", scale);
  check_cpu(op, scale);
  const std::int64_t groups = scale.rank == 2 ? scale.shape[1] : 0;
  if (scale.rank != 2 || scale.shape[0] != out || groups < 1 || (groups > 1 && (in == 0 || in % groups != 0)))
    fail_input("{}: scale has shape {}; expected [{}, groups] with groups dividing {}.", op, shape_text(scale), out,
               in);
  check_contiguous(op, "scale", scale);
  if (zero_point != nullptr) {
    check_dtype(op, "zero_point", *zero_point, DType::s8);
    check_cpu(op, *zero_point);
    check_shape(op, "zero_point", *zero_point, out, groups);
  }
  return groups;
}

}  // namespace qtale::ops

#include <vector>

#include "core/text.h"
#include "cpu/backend.h"
#include "ops/check.h"
#include "qtale/ops.h"

namespace qtale {
namespace {

constexpr auto kOp = "qmatmul";

cpu::QmatmulPart checked(const TensorView& x, const QmatmulWeight& weight) {
  const PrepackedInfo info = prepacked_info(weight.prepacked);
  const TensorView& y = weight.y;
  if (x.shape[1] != info.in_features)
    fail_input("qmatmul: x has {} features; the weight takes {}.", x.shape[1], info.in_features);
  ops::check_dtype(kOp, "y", y, x.dtype);
  ops::check_matrix(kOp, "y", y);
  if (y.shape[0] != x.shape[0] || y.shape[1] != info.out_features)
    fail_input("qmatmul: y has shape {}; expected [{}, {}].", ops::shape_text(y), x.shape[0], info.out_features);
  ops::check_cpu(kOp, y);
  if (weight.bias != nullptr) {
    ops::check_dtype(kOp, "bias", *weight.bias, DType::f32);
    ops::check_cpu(kOp, *weight.bias);
    if (weight.bias->rank != 1 || weight.bias->shape[0] != info.out_features)
      fail_input("qmatmul: bias has shape {}; expected [{}].", ops::shape_text(*weight.bias), info.out_features);
    ops::check_contiguous(kOp, "bias", *weight.bias);
  }
  return {{weight.prepacked.as<const std::uint8_t>(), weight.prepacked.shape[0]},
          weight.bias ? weight.bias->as<const float>() : nullptr,
          {y.data, y.dtype, y.strides[0]}};
}

}  // namespace

void qmatmul(const TensorView& x, std::span<const QmatmulWeight> weights, Compute compute,
             std::span<const TensorView> next) {
  ops::check_float(kOp, "x", x);
  ops::check_matrix(kOp, "x", x);
  ops::check_cpu(kOp, x);
  std::vector<cpu::QmatmulPart> parts;
  for (const QmatmulWeight& weight : weights) parts.push_back(checked(x, weight));
  std::vector<cpu::PrepackedBuffer> following;
  for (const TensorView& prepacked : next) {
    static_cast<void>(prepacked_info(prepacked));  // throws where it is none
    following.push_back({prepacked.as<const std::uint8_t>(), prepacked.shape[0]});
  }
  cpu::qmatmul(parts, x.shape[0], {x.data, x.dtype, x.strides[0]}, compute, following);
}

void qmatmul(const TensorView& x, const TensorView& prepacked, const TensorView* bias, const TensorView& y,
             Compute compute) {
  const QmatmulWeight weight{prepacked, bias, y};
  qmatmul(x, {&weight, 1}, compute);
}

}  // namespace qtale

#include "engine/router.h"

#include <algorithm>
#include <cmath>

#include "qtale/decoder_ops.h"
#include "qtale/device.h"

namespace qtale::engine {
namespace {

const TensorView* pointer(const std::optional<TensorView>& tensor) { return tensor ? &*tensor : nullptr; }

float sigmoid(float x) { return 1.0F / (1.0F + std::exp(-x)); }

// Routers are dense. In float32 they would take an eighth of a prompt's time where a quarter of the tokens execute.
Compute compute_of(Compute rounding, std::int64_t hidden_size) {
  const bool rounds = rounds_to_bfloat16(rounding) && has_bfloat16() && hidden_size % 2 == 0;
  return rounds ? Compute::bfloat16 : Compute::floating;
}

}  // namespace

LayerRouter::LayerRouter(const Router& router, Compute rounding)
    : router_(&router), rounding_(rounding), matrix_(router.w1) {
  const std::int64_t rows = router.w1.shape[0], hidden = router.w1.shape[1];
  if (compute_of(rounding, hidden) != Compute::bfloat16) return;
  rounded_.resize(static_cast<std::size_t>(rows * hidden));
  matrix_ = TensorView::matrix(rounded_.data(), DType::bf16, rows, hidden);
  round_weights(router.w1, matrix_);
}

std::int64_t LayerRouter::bytes() const {
  const auto size = [](const std::optional<TensorView>& part) {
    return part ? part->numel() * size_of(part->dtype) : 0;
  };
  const Router& r = *router_;
  return size(matrix_) + size(r.bias1) + size(r.norm) + size(r.w2) + size(r.bias2);
}

std::vector<float> LayerRouter::execution_probabilities(const TensorView& x, Workspace& workspace) const {
  const Router& router = *router_;
  const std::int64_t rows = x.shape[0], width = router.w1.shape[0];
  const bool single = !router.w2;
  // silu_mul multiplies with a second half, which is all ones here.
  const TensorView memory = workspace.matrix(Buffer::router, rows, 2 * width + 2);
  const TensorView hidden = columns(memory, 0, width), logits = columns(memory, 2 * width, 2);
  // Asked anew, because the kernels in use may be others than when the decoder was made.
  const Compute compute = compute_of(rounding_, x.shape[1]);
  matmul(x, compute == Compute::bfloat16 ? matrix_ : router.w1, pointer(router.bias1), hidden, compute);
  if (!single) {
    if (router.norm) rms_norm(hidden, *router.norm, router.norm_eps, hidden);
    for (std::int64_t r = 0; r < rows; ++r)
      std::fill_n(memory.as<float>() + r * memory.strides[0] + width, width, 1.0F);
    silu_mul(columns(memory, 0, 2 * width), hidden);
    matmul(hidden, *router.w2, pointer(router.bias2), logits);
  }
  std::vector<float> probabilities(static_cast<std::size_t>(rows));
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* row = memory.as<float>() + r * memory.strides[0];
    const float* pair = row + 2 * width;
    probabilities[static_cast<std::size_t>(r)] = sigmoid(single ? row[0] : pair[1] - pair[0]);
  }
  return probabilities;
}

}  // namespace qtale::engine

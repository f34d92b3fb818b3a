#include "engine/projection.h"

#include <algorithm>
#include <vector>

#include "core/text.h"
#include "engine/workspace.h"
#include "qtale/decoder_ops.h"

namespace qtale::engine {
namespace {

const TensorView* bias_of(const Matrix& matrix) { return matrix.bias ? &*matrix.bias : nullptr; }

}  // namespace

bool is_packed(const Matrix& matrix) { return matrix.weight.dtype == DType::u8; }

bool is_packed(std::span<const Matrix> projection) {
  return std::all_of(projection.begin(), projection.end(), [](const Matrix& matrix) { return is_packed(matrix); });
}

bool is_dense(std::span<const Matrix> projection) {
  return std::none_of(projection.begin(), projection.end(), [](const Matrix& matrix) { return is_packed(matrix); });
}

std::int64_t out_features(const Matrix& matrix) {
  return is_packed(matrix) ? prepacked_info(matrix.weight).out_features : outputs_of(matrix.weight);
}

std::int64_t in_features(const Matrix& matrix) {
  return is_packed(matrix) ? prepacked_info(matrix.weight).in_features : inputs_of(matrix.weight);
}

std::int64_t out_features(const Projection& projection) {
  std::int64_t sum = 0;
  for (const Matrix& matrix : projection) sum += out_features(matrix);
  return sum;
}

Matrix some_outputs(const Matrix& matrix, std::int64_t first, std::int64_t count) {
  if (count == out_features(matrix)) return matrix;
  if (is_packed(matrix)) fail_input("some_outputs: a packed matrix has no parts; multiply by all of it.");
  Matrix part = matrix;
  const std::int64_t unit = is_tiled(matrix.weight) ? kTileOutputs : 1;
  if (first % unit != 0 || count % unit != 0)
    fail_input("some_outputs: outputs {} to {} are no whole tiles of {}.", first, first + count, unit);
  const auto skipped = first / unit * part.weight.strides[0] * size_of(part.weight.dtype);
  part.weight.data = part.weight.as<std::byte>() + skipped;
  part.weight.shape[0] = count / unit;
  if (part.bias) part.bias = TensorView::vector(part.bias->as<float>() + first, DType::f32, count);
  return part;
}

void multiply(const TensorView& x, const Matrix& matrix, const TensorView& y, Compute compute) {
  const TensorView* bias = bias_of(matrix);
  is_packed(matrix) ? qmatmul(x, matrix.weight, bias, y, compute) : matmul(x, matrix.weight, bias, y, compute);
}

void multiply(const TensorView& x, const Projection& projection, const TensorView& y, Compute compute,
              std::span<const Matrix> next, std::int64_t first) {
  std::int64_t column = 0;
  std::vector<QmatmulWeight> packed;
  for (const Matrix& matrix : projection) {
    const std::int64_t count = out_features(matrix);
    const TensorView part = columns(y, column, count);
    column += count;
    if (column <= first) continue;
    if (is_packed(matrix)) {
      packed.push_back({matrix.weight, bias_of(matrix), part});
    } else {
      matmul(x, matrix.weight, bias_of(matrix), part, compute);
    }
  }
  std::vector<TensorView> following;
  if (is_packed(next))
    for (const Matrix& matrix : next) following.push_back(matrix.weight);
  if (!packed.empty()) qmatmul(x, packed, compute, following);
}

bool multiply_add(const TensorView& x, const Projection& projection, const TensorView& y, Compute compute) {
  if (projection.size() != 1 || is_packed(projection[0]) || projection[0].bias) return false;
  return matmul_add(x, projection[0].weight, y, compute);
}

bool multiply_gated(const TensorView& x, const Projection& gate_up, const TensorView& y, Compute compute) {
  const std::int64_t count = y.shape[1];
  if (gate_up.size() != 1 || is_packed(gate_up[0]) || gate_up[0].bias || out_features(gate_up[0]) != 2 * count)
    return false;
  if (is_tiled(gate_up[0].weight) && count % kTileOutputs != 0) return false;
  const Matrix gate = some_outputs(gate_up[0], 0, count), up = some_outputs(gate_up[0], count, count);
  return gated_matmul(x, gate.weight, up.weight, y, compute);
}

}  // namespace qtale::engine

#include "solve_samples.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace qtale::test {
namespace {

// Lower L with L L^T = a.
std::vector<double> cholesky(const std::vector<double>& a, std::int64_t n) {
  std::vector<double> l(a.size());
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      double sum = a[i * n + j];
      for (std::int64_t k = 0; k < j; ++k) sum -= l[i * n + k] * l[j * n + k];
      l[i * n + j] = i == j ? std::sqrt(sum) : sum / l[j * n + j];
    }
  }
  return l;
}

}  // namespace

// With P reversing the order: P (H + damp I) P = L L^T, so H^-1 = P L^-T L^-1 P = U^T U for U = P L^-1 P.
std::vector<double> inverse_factor(const std::vector<double>& hessian, std::int64_t n, double damp) {
  std::vector<double> turned(hessian.size()), inverse(hessian.size()), out(hessian.size());
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = 0; j < n; ++j)
      turned[i * n + j] = hessian[(n - 1 - i) * n + n - 1 - j] + (i == j ? damp : 0.0);
  const std::vector<double> l = cholesky(turned, n);
  for (std::int64_t j = 0; j < n; ++j) {
    for (std::int64_t i = j; i < n; ++i) {
      double sum = i == j ? 1.0 : 0.0;
      for (std::int64_t k = j; k < i; ++k) sum -= l[i * n + k] * inverse[k * n + j];
      inverse[i * n + j] = sum / l[i * n + i];
    }
  }
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = 0; j < n; ++j) out[i * n + j] = inverse[(n - 1 - i) * n + n - 1 - j];
  return out;
}

double objective(const float* weight, const std::vector<double>& quantized, const std::vector<double>& hessian,
                 std::int64_t row) {
  const auto n = static_cast<std::int64_t>(quantized.size());
  std::vector<double> d(quantized.size());
  for (std::int64_t i = 0; i < n; ++i) d[i] = static_cast<double>(weight[row * (n + 3) + i]) - quantized[i];
  double total = 0.0;
  for (std::int64_t i = 0; i < n; ++i) {
    double sum = 0.0;
    for (std::int64_t j = 0; j < n; ++j) sum += hessian[i * n + j] * d[j];
    total += sum * d[i];
  }
  return total;
}

Layer::Layer(Random& random, std::int64_t row_count, std::int64_t column_count)
    : rows(row_count), columns(column_count) {
  const std::int64_t samples = columns + 20;
  weight.resize(static_cast<std::size_t>(rows * stride()));
  for (float& w : weight) w = random.normal();
  std::vector<double> x(static_cast<std::size_t>(samples * columns));
  for (std::int64_t s = 0; s < samples; ++s)
    for (std::int64_t c = 0; c < columns; ++c)
      x[s * columns + c] = c % 11 == 5 ? 0.0 : (c > 0 ? 0.7 * x[s * columns + c - 1] : 0.0) + double{random.normal()};
  const auto size = static_cast<std::size_t>(columns * columns);
  hessian.resize(size);
  for (std::int64_t i = 0; i < columns; ++i)
    for (std::int64_t j = 0; j < columns; ++j)
      for (std::int64_t s = 0; s < samples; ++s)
        hessian[i * columns + j] += x[s * columns + i] * x[s * columns + j] / static_cast<double>(samples);
  hessian32.assign(hessian.begin(), hessian.end());
  for (std::int64_t c = 0; c < columns; ++c) diagonal.push_back(hessian32[c * (columns + 1)]);
  order.resize(static_cast<std::size_t>(columns));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return diagonal[a] > diagonal[b]; });
  std::vector<double> visited(size);
  for (std::int64_t i = 0; i < columns; ++i)
    for (std::int64_t j = 0; j < columns; ++j) visited[i * columns + j] = hessian[order[i] * columns + order[j]];
  const std::vector<double> u = inverse_factor(visited, columns, 0.02);
  factor.assign(u.begin(), u.end());
}

TensorView Layer::weight_view() {
  TensorView t = TensorView::matrix(weight.data(), DType::f32, rows, stride());
  t.shape[1] = columns;
  return t;
}

Solution::Solution(const Shape& shape)
    : weight{shape, std::vector<std::int8_t>(static_cast<std::size_t>(shape.n * shape.k)),
             Floats(shape.scale_dtype, shape.n * shape.groups),
             std::vector<std::int8_t>(static_cast<std::size_t>(shape.symmetric ? 0 : shape.n * shape.groups))},
      loss(static_cast<std::size_t>(shape.n)) {}

TensorView* Solution::zero_point() {
  if (weight.shape.symmetric) return nullptr;
  zero_view_ = view(weight.zero, weight.shape.n, weight.shape.groups);
  return &zero_view_;
}

std::vector<double> Solution::values(std::int64_t row) const {
  std::vector<double> out;
  for (std::int64_t c = 0; c < weight.shape.k; ++c) out.push_back(weight.value(row, c));
  return out;
}

std::vector<std::int64_t> Solution::different_rows(const Solution& other) const {
  std::vector<std::int64_t> rows;
  const Shape& s = weight.shape;
  for (std::int64_t r = 0; r < s.n; ++r) {
    bool same = std::equal(&weight.codes[r * s.k], &weight.codes[r * s.k] + s.k, &other.weight.codes[r * s.k]);
    for (std::int64_t g = r * s.groups; g < (r + 1) * s.groups; ++g) {
      same &= std::fabs(weight.scale.get(g) / other.weight.scale.get(g) - 1.0f) < 1e-4f;
      same &= s.symmetric || weight.zero[g] == other.weight.zero[g];
    }
    if (!same) rows.push_back(r);
  }
  return rows;
}

}  // namespace qtale::test

// Layers to solve: weights, Gram matrices of correlated inputs, Cholesky factors of their inverses in float64.
#pragma once

#include <vector>

#include "qtale/solve.h"
#include "support.h"

namespace qtale::test {

// Upper triangular U with (H + damp I)^-1 = U^T U, [n, n].
std::vector<double> inverse_factor(const std::vector<double>& hessian, std::int64_t n, double damp);
// (w - q) H (w - q)^T of one row.
double objective(const float* weight, const std::vector<double>& quantized, const std::vector<double>& hessian,
                 std::int64_t row);

struct Layer {
  std::int64_t rows, columns;
  Lines<float> weight;          // [rows, columns + 3]: rows are apart
  std::vector<double> hessian;  // [columns, columns]; some columns are dead
  Lines<float> hessian32, factor, diagonal;
  std::vector<std::int32_t> order;

  Layer(Random& random, std::int64_t rows, std::int64_t columns);
  std::int64_t stride() const { return columns + 3; }
  TensorView weight_view();
  TensorView square(Lines<float>& matrix) const {
    return TensorView::matrix(matrix.data(), DType::f32, columns, columns);
  }
  TensorView order_view() { return TensorView::vector(order.data(), DType::s32, columns); }
};

// Codes with their grids.
struct Solution {
  Weight weight;
  std::vector<double> loss;

  explicit Solution(const Shape& shape);
  TensorView codes() { return view(weight.codes, weight.shape.n, weight.shape.k); }
  TensorView scale() const { return weight.scale.matrix(weight.shape.n, weight.shape.groups); }
  TensorView* zero_point();
  TensorView losses() { return TensorView::vector(loss.data(), DType::f64, weight.shape.n); }
  std::vector<double> values(std::int64_t row) const;
  // Rows of which codes or parameters differ.
  std::vector<std::int64_t> different_rows(const Solution& other) const;

 private:
  TensorView zero_view_;
};

}  // namespace qtale::test

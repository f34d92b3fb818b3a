// search_scales, rounding_loss, prox_linf, project_l1 and accumulate_gram on every instruction set.
#include <algorithm>
#include <cmath>

#include "catch.h"
#include "core/half.h"
#include "solve_samples.h"

namespace qtale::test {
namespace {

double error_of(const Layer& layer, const Solution& s, std::int64_t row, std::int64_t group, bool blocks) {
  const std::int64_t size = layer.columns / s.weight.shape.groups, first = group * size;
  std::vector<double> d;
  for (std::int64_t c = first; c < first + size; ++c) {
    const double half = 1 << (s.weight.shape.bits - 1), scale = s.weight.scale_of(row, c);
    const double w = layer.weight[row * layer.stride() + c], zero = s.weight.zero_of(row, c);
    d.push_back(w - (std::clamp(std::nearbyint(w / scale) + zero, -half, half - 1) - zero) * scale);
  }
  double total = 0.0;
  for (std::int64_t i = 0; i < size; ++i)
    for (std::int64_t j = 0; j < size; ++j)
      if (blocks || i == j) total += d[i] * d[j] * layer.hessian[(first + i) * layer.columns + first + j];
  return total;
}

Solution searched(Layer& layer, const Shape& shape, bool blocks) {
  const std::int64_t size = layer.columns / shape.groups;
  Lines<float> forms;
  for (std::int64_t c = 0; c < layer.columns; ++c)
    for (std::int64_t i = 0; i < size; ++i) forms.push_back(layer.hessian32[c * layer.columns + c / size * size + i]);
  TensorView importance = TensorView::vector(layer.diagonal.data(), DType::f32, layer.columns);
  if (blocks) {
    importance = TensorView::matrix(forms.data(), DType::f32, size, size);
    importance.rank = 3;
    importance.shape = {shape.groups, size, size};
    importance.strides = {size * size, size, 1};
  }
  Solution s(shape);
  search_scales(layer.weight_view(), importance, shape.bits, s.scale(), s.zero_point(),
                {13, 1.1f, 0.4f, shape.symmetric});
  return s;
}

double threshold_of(std::vector<double> magnitudes, double step) {
  std::sort(magnitudes.begin(), magnitudes.end(), std::greater<>());
  double sum = 0.0, best = 0.0;
  for (std::size_t k = 0; k < magnitudes.size(); ++k) {
    sum += magnitudes[k];
    best = std::max(best, (sum - step) / static_cast<double>(k + 1));
  }
  return best;
}

}  // namespace

TEST_CASE("search_scales: errors as small as the reference's, in float64") {
  Random random(411);
  for (const auto& [rows, columns, groups] : {std::tuple{1, 1, 1}, {50, 36, 4}, {97, 130, 1}, {13, 64, 2}}) {
    Layer layer(random, rows, columns);
    for (const int bits : kBits) {
      for (const bool symmetric : {true, false}) {
        for (const bool blocks : {true, false}) {
          const Shape shape{rows, columns, groups, bits, symmetric, bits == 3 ? DType::bf16 : DType::f32};
          INFO(shape.text() << " blocks " << blocks);
          const IsaScope reference("reference");
          const Solution expected = searched(layer, shape, blocks);
          for (const std::string& isa : cpu_isas()) {
            INFO(isa);
            const IsaScope scope(isa);
            const Solution found = searched(layer, shape, blocks);
            double worst = 0.0;
            for (std::int64_t r = 0; r < rows; ++r) {
              for (std::int64_t g = 0; g < groups; ++g) {
                const double best = error_of(layer, expected, r, g, blocks);
                worst = std::max(worst, (error_of(layer, found, r, g, blocks) - best) / (best + 1e-6));
              }
            }
            // A weight half way between two codes may go to either of them; a form tells those apart.
            CHECK(worst < (blocks ? 0.5 : 2e-3));
          }
        }
      }
    }
  }
}

TEST_CASE("rounding_loss: the trace in float64") {
  Random random(412);
  for (const auto& [rows, columns, groups] : {std::tuple{1, 1, 1}, {50, 36, 4}, {97, 130, 1}}) {
    Layer layer(random, rows, columns);
    Lines<float> factor(static_cast<std::size_t>(columns)), scaled = layer.weight;
    for (float& f : factor) f = random.uniform(0.3f, 3.0f);
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < columns; ++c) scaled[r * layer.stride() + c] *= factor[c];
    for (const bool symmetric : {true, false}) {
      const Shape shape{rows, columns, groups, 4, symmetric, DType::f16};
      TensorView view = layer.weight_view();
      view.data = scaled.data();
      const TensorView factors = TensorView::vector(factor.data(), DType::f32, columns);
      for (const std::string& isa : cpu_isas()) {
        INFO(isa << " " << shape.text());
        const IsaScope scope(isa);
        Solution s(shape);
        quantize(view, 4, s.codes(), s.scale(), s.zero_point());
        double expected = 0.0;
        for (std::int64_t r = 0; r < rows; ++r) {
          std::vector<double> q = s.values(r);
          for (std::int64_t c = 0; c < columns; ++c) q[c] /= double{factor[c]};
          expected += objective(layer.weight.data(), q, layer.hessian, r);
        }
        const double found = rounding_loss(layer.weight_view(), layer.square(layer.hessian32), &factors, 4,
                                           columns / groups, symmetric, DType::f16);
        CHECK(std::fabs(found - expected) <= 1e-4 * expected + 1e-9);
      }
    }
  }
}

TEST_CASE("prox_linf and project_l1: the threshold by sorting, rows apart, in place") {
  Random random(413);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const auto& [rows, columns, size] : {std::tuple{1, 1, 0}, {5, 33, 0}, {3, 96, 32}, {2, 5000, 0}, {2, 21, 7}}) {
      for (const float step : {0.0f, 1e-3f, 0.7f, 25.0f, 1e5f}) {
        INFO(isa << " " << columns << " step " << step);
        Lines<float> values(static_cast<std::size_t>(rows * columns));
        for (float& v : values) v = random.normal();
        Lines<float> clipped(values.size()), inside = values;
        prox_linf(TensorView::matrix(values.data(), DType::f32, rows, columns), size, step,
                  TensorView::matrix(clipped.data(), DType::f32, rows, columns));
        const TensorView in_place = TensorView::matrix(inside.data(), DType::f32, rows, columns);
        project_l1(in_place, size, step, in_place);
        const std::int64_t group = size ? size : columns;
        double worst = 0.0;
        for (std::int64_t k = 0; k < rows * columns; k += group) {
          std::vector<double> magnitudes;
          for (std::int64_t i = k; i < k + group; ++i) magnitudes.push_back(std::fabs(double{values[i]}));
          const double t = threshold_of(magnitudes, double{step});
          for (std::int64_t i = k; i < k + group; ++i) {
            const double expected = std::clamp(double{values[i]}, -t, t);
            worst = std::max(worst, std::fabs(double{clipped[i]} - expected));
            worst = std::max(worst, std::fabs(double{inside[i]} - (double{values[i]} - expected)));
          }
        }
        CHECK(worst < 2e-6);
      }
    }
  }
}

// The largest error of gram = 1 + x^T diag(weight) x over what it may be measured with; infinite where more was
// written.
double gram_error(const std::vector<double>& gram, const std::vector<double>& x, std::int64_t rows, std::int64_t n,
                  const float* weight) {
  double worst = 0.0;
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      double sum = 1.0, size = 1e-30;
      for (std::int64_t r = 0; r < rows; ++r) {
        const double product = x[r * n + i] * x[r * n + j] * (weight ? double{weight[r]} : 1.0);
        sum += product;
        size += std::fabs(product);
      }
      if (j >= i) worst = std::max(worst, std::fabs(gram[i * n + j] - sum) / size);
      if (j < i && gram[i * n + j] != 1.0) return INFINITY;
    }
  }
  return worst;
}

TEST_CASE("accumulate_gram: the bound of its header, what lies below stays, threads change nothing") {
  Random random(414);
  const std::string isa = GENERATE(from_range(cpu_isas()));
  const DType dtype = GENERATE(DType::f32, DType::bf16);
  const bool weighted = GENERATE(true, false);
  const IsaScope scope(isa);
  for (const auto& [rows, columns] : {std::pair{0, 3}, {1, 1}, {5, 97}, {1030, 50}, {40, 131}, {64, 32}, {2100, 33}}) {
    const std::int64_t n = columns, stride = n + 2;
    Lines<float> x(static_cast<std::size_t>(rows * stride)), weight(static_cast<std::size_t>(rows));
    Lines<std::uint16_t> halves(x.size());
    std::vector<double> exact;
    for (float& v : x) v = random.normal();
    for (float& v : weight) v = random.uniform(0.0f, 2.0f);
    for (std::size_t i = 0; i < x.size(); ++i) {
      halves[i] = float_to_bf16(x[i]);
      if (static_cast<std::int64_t>(i) % stride < n)
        exact.push_back(double{dtype == DType::f32 ? x[i] : bf16_to_float(halves[i])});
    }
    void* data = dtype == DType::f32 ? static_cast<void*>(x.data()) : halves.data();
    TensorView inputs = TensorView::matrix(data, dtype, rows, stride);
    inputs.shape[1] = n;
    const TensorView weights = TensorView::vector(weight.data(), DType::f32, rows);
    std::vector<std::vector<double>> found;
    for (const int threads : {1, 3}) {
      const ThreadScope thread_scope(threads);
      found.emplace_back(static_cast<std::size_t>(n * n), 1.0);
      accumulate_gram(inputs, weighted ? &weights : nullptr, TensorView::matrix(found.back().data(), DType::f64, n, n));
    }
    INFO(isa << " " << rows << " x " << columns);
    CHECK(found[0] == found[1]);
    CHECK(gram_error(found[0], exact, rows, n, weighted ? weight.data() : nullptr) <= 1026 * 0x1p-24);
  }
}

}  // namespace qtale::test

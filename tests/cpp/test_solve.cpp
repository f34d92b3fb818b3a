// The column loops of every instruction set: gptq, refine_codes and refit_scales against the reference and float64.
#include <algorithm>
#include <cmath>

#include "catch.h"
#include "solve_samples.h"

namespace qtale::test {
namespace {

// Rows, columns and groups: below, at and beyond vectors, tiles, panels and blocks.
constexpr std::int64_t kShapes[][3] = {{1, 1, 1}, {3, 7, 1}, {50, 12, 4}, {97, 130, 13}, {24, 250, 2}, {9, 256, 8}};

std::vector<Shape> forms(std::int64_t rows, std::int64_t columns, std::int64_t groups) {
  std::vector<Shape> out;
  for (const int bits : kBits)
    for (const bool symmetric : {true, false})
      for (const DType dtype : kFloatTypes)
        if (dtype == DType::f32 || bits == 3) out.push_back({rows, columns, groups, bits, symmetric, dtype});
  return out;
}

// Grids by a search, a few of them negative.
Solution with_grids(Layer& layer, const Shape& shape) {
  Solution s(shape);
  search_scales(layer.weight_view(), TensorView::vector(layer.diagonal.data(), DType::f32, layer.columns), shape.bits,
                s.scale(), s.zero_point(), {9, 1.05f, 0.5f, shape.symmetric});
  return s;
}

Solution solved(Layer& layer, const Solution& grids) {
  Solution s = grids;
  const TensorView order = layer.order_view(), loss = s.losses();
  gptq(layer.weight_view(), layer.square(layer.factor), &order, s.weight.shape.bits, s.scale(), s.zero_point(), true,
       s.codes(), &loss);
  return s;
}

Solution solved_as_it_goes(Layer& layer, const Shape& shape) {
  Solution s(shape);
  const TensorView diagonal = TensorView::vector(layer.diagonal.data(), DType::f32, layer.columns);
  gptq(layer.weight_view(), layer.square(layer.factor), nullptr, shape.bits, s.scale(), s.zero_point(), false,
       s.codes(), nullptr, {5, 1.0f, 0.6f, false}, &diagonal);
  return s;
}

// A row whose codes part from the reference's came near a tie: both are equally good then.
void check_near(const Solution& found, const Solution& expected) {
  const std::vector<std::int64_t> rows = found.different_rows(expected);
  CHECK(static_cast<double>(rows.size()) <= 1.0 + 0.05 * static_cast<double>(expected.weight.shape.n));
  for (std::int64_t r = 0; r < expected.weight.shape.n; ++r)
    if (std::find(rows.begin(), rows.end(), r) == rows.end())
      CHECK(std::fabs(found.loss[r] - expected.loss[r]) <= 1e-3 * expected.loss[r] + 1e-9);
}

double total_objective(const Layer& layer, const Solution& s) {
  double total = 0.0;
  for (std::int64_t r = 0; r < layer.rows; ++r) total += objective(layer.weight.data(), s.values(r), layer.hessian, r);
  return total;
}

}  // namespace

TEST_CASE("gptq: every instruction set makes the reference's codes, loss is the damped objective") {
  Random random(401);
  for (const auto& [rows, columns, groups] : kShapes) {
    Layer layer(random, rows, columns);
    for (const Shape& shape : forms(rows, columns, groups)) {
      INFO(shape.text());
      const IsaScope reference("reference");
      const Solution grids = with_grids(layer, shape);
      const Solution expected = solved(layer, grids), moving = solved_as_it_goes(layer, shape);
      for (std::int64_t r = 0; r < rows; r += 7) {
        const std::vector<double> q = expected.values(r);
        double damping = 0.0;
        for (std::int64_t c = 0; c < columns; ++c) {
          const double d = double{layer.weight[r * layer.stride() + c]} - q[c];
          damping += 0.02 * d * d;
        }
        const double damped = objective(layer.weight.data(), q, layer.hessian, r) + damping;
        CHECK(std::fabs(expected.loss[r] - damped) <= 2e-3 * damped + 1e-9);
      }
      for (const std::string& isa : cpu_isas()) {
        INFO(isa);
        const IsaScope scope(isa);
        check_near(solved(layer, grids), expected);
        check_near(solved_as_it_goes(layer, shape), moving);
      }
    }
  }
}

TEST_CASE("gptq: the factor of an identity rounds to nearest") {
  Random random(402);
  Layer layer(random, 53, 96);
  std::fill(layer.factor.begin(), layer.factor.end(), 0.0f);
  for (std::int64_t i = 0; i < layer.columns; ++i) layer.factor[i * (layer.columns + 1)] = 1.0f;
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const Shape& shape : forms(53, 96, 3)) {
      INFO(isa << " " << shape.text());
      Solution rounded(shape);
      quantize(layer.weight_view(), shape.bits, rounded.codes(), rounded.scale(), rounded.zero_point());
      CHECK(solved(layer, rounded).different_rows(rounded).empty());
    }
  }
}

TEST_CASE("refine_codes and refit_scales: never a rise, and what the reference finds") {
  Random random(403);
  for (const auto& [rows, columns, groups] : kShapes) {
    Layer layer(random, rows, columns);
    for (const Shape& shape : forms(rows, columns, groups)) {
      INFO(shape.text());
      Solution start = with_grids(layer, shape);
      gptq(layer.weight_view(), layer.square(layer.factor), nullptr, shape.bits, start.scale(), start.zero_point(),
           true, start.codes(), nullptr);
      std::vector<double> found;
      for (const std::string& isa : cpu_isas()) {
        INFO(isa);
        const IsaScope scope(isa);
        Solution s = start;
        double before = total_objective(layer, s);
        const TensorView order = layer.order_view();
        for (int round = 0; round < 3; ++round) {
          refit_scales(layer.weight_view(), layer.square(layer.hessian32), shape.bits, s.codes(), s.zero_point(),
                       s.scale());
          const double refitted = total_objective(layer, s);
          CHECK(refitted <= before * (1.0 + 1e-12));
          refine_codes(layer.weight_view(), layer.square(layer.hessian32), shape.bits, s.scale(), s.zero_point(),
                       round == 1 ? &order : nullptr, 1, s.codes());
          before = total_objective(layer, s);
          CHECK(before <= refitted * (1.0 + 1e-12));
        }
        found.push_back(before);
      }
      for (const double value : found) CHECK(std::fabs(value - found[0]) <= 0.05 * found[0] + 1e-9);
    }
  }
}

TEST_CASE("solvers: no bit depends on threads") {
  Random random(404);
  Layer layer(random, 131, 250);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    INFO(isa);
    std::vector<Solution> found;
    for (const int threads : {1, 2, 3}) {
      const ThreadScope thread_scope(threads);
      Solution s = solved(layer, with_grids(layer, {131, 250, 5, 3, true, DType::f32}));
      refit_scales(layer.weight_view(), layer.square(layer.hessian32), 3, s.codes(), nullptr, s.scale());
      refine_codes(layer.weight_view(), layer.square(layer.hessian32), 3, s.scale(), nullptr, nullptr, 2, s.codes());
      CHECK(s.loss == (found.empty() ? s.loss : found[0].loss));
      found.push_back(s);
      CHECK(s.weight.codes == found[0].weight.codes);
      CHECK(first_difference(s.weight.scale, found[0].weight.scale) == -1);
    }
  }
}

TEST_CASE("solvers: nothing to solve") {
  Random random(405);
  Layer layer(random, 0, 8);
  Solution s({0, 8, 2, 4, true, DType::f32});
  gptq(layer.weight_view(), layer.square(layer.factor), nullptr, 4, s.scale(), nullptr, false, s.codes(), nullptr);
  CHECK(refine_codes(layer.weight_view(), layer.square(layer.hessian32), 4, s.scale(), nullptr, nullptr, 1,
                     s.codes()) == 0);
  CHECK(refit_scales(layer.weight_view(), layer.square(layer.hessian32), 4, s.codes(), nullptr, s.scale()) == 0);
}

}  // namespace qtale::test

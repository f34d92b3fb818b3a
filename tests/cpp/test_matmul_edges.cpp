// qmatmul kernels at the ends of their ranges: extreme codes and activations, zeros, NaN, infinity, no inputs.
#include <cfloat>
#include <cmath>
#include <limits>

#include "catch.h"
#include "matmul_oracle.h"

namespace qtale::test {
namespace {

constexpr std::int64_t kRows = 7, kCols = 66;

struct Grouping {
  std::int64_t k, groups;
};
constexpr Grouping kGroupings[] = {{640, 1}, {640, 20}, {640, 10}, {640, 5}, {96, 1}, {288, 3}, {33, 1}};

// Calls fn for every tier, mode, bit width, grouping and symmetry.
template <class Fn>
void for_all(Fn&& fn) {
  for (const int bits : kBits)
    for (const Grouping& g : kGroupings)
      for (const bool symmetric : {true, false})
        for (const Compute compute : kModes) fn(Shape{kCols, g.k, g.groups, bits, symmetric, DType::f32}, compute);
}

void check_tables(const Weight& weight, const Activations& x, Compute compute, const std::string& what) {
  Random random(31);
  const Expected expected = expect(weight, x, compute, {});
  for (const cpu::KernelTable* table : cpu::available_tables()) {
    const std::int64_t rows = table == &cpu::reference_table ? 1 : x.rows;
    const Product product = run_kernel(*table, compute, make_panels(weight, table->panel_rows), x, rows, {}, random);
    const std::string wrong = compare(expected, product.y, rows, kCols);
    if (!wrong.empty())
      FAIL_CHECK(table->name << " " << name_of(compute) << " " << weight.shape.text() << ", " << what << ": " << wrong);
  }
}

// Codes of row r and input k, of `half` = 2^(bits-1): all lowest, all highest, alternating.
int extreme_code(std::int64_t r, std::int64_t k, int half) {
  switch (r % 4) {
    case 0: return -half;
    case 1: return half - 1;
    case 2: return k % 2 ? -half : half - 1;
    default: return k / 4 % 2 ? -half : half - 1;
  }
}

float extreme_activation(std::int64_t m, std::int64_t k) {
  switch (m % 5) {
    case 0: return 1.0f;
    case 1: return -1.0f;
    case 2: return k % 2 ? -1.0f : 1.0f;
    case 3: return k / 4 % 2 ? -1.0f : 1.0f;
    default: return k % 2 ? 1.0f : -1.0f;
  }
}

}  // namespace

// Integer kernels add products in 16 or 32 bits: no sum of extremes may wrap or saturate.
TEST_CASE("qmatmul: extreme codes meet extreme activations") {
  for_all([](const Shape& shape, Compute compute) {
    Random random(32);
    const int half = 1 << (shape.bits - 1);
    Weight weight = random_weight(random, shape);
    for (std::int64_t r = 0; r < kCols; ++r)
      for (std::int64_t k = 0; k < shape.k; ++k)
        weight.codes[r * shape.k + k] = static_cast<std::int8_t>(extreme_code(r, k, half));
    Activations x(DType::f32, kRows, shape.k);
    for (std::int64_t m = 0; m < kRows; ++m)
      for (std::int64_t k = 0; k < shape.k; ++k) x.set(m, k, extreme_activation(m, k));
    for (const int zero : {half - 1, -half}) {
      for (auto& z : weight.zero) z = static_cast<std::int8_t>(zero);
      check_tables(weight, x, compute, "extremes with zero point " + std::to_string(zero));
      if (shape.symmetric) break;
    }
  });
}

TEST_CASE("qmatmul: huge and tiny and empty activation groups") {
  for_all([](const Shape& shape, Compute compute) {
    Random random(33);
    const Weight weight = random_weight(random, shape);
    Activations x = normal_activations(random, DType::f32, kRows, shape.k);
    const float factors[] = {1e30f, 1e-30f, 1e-38f, 1e-44f, 0.0f, 1.0f, 1e10f};
    for (std::int64_t m = 0; m < kRows; ++m)
      for (std::int64_t k = 0; k < shape.k; ++k) x.set(m, k, x.get(m, k) * factors[(m + k / 128) % 7]);
    check_tables(weight, x, compute, "mixed magnitudes");
  });
}

// Weights of one and zeros give back what activations were rounded to, whose bound no sum of others hides.
TEST_CASE("qmatmul int16: tiny and huge groups are rounded within half a step of 16 bits") {
  constexpr std::int64_t kIn = 256, kGroup = 128, kSteps = 40;
  for (const int bits : kBits)
    for (const float weight_scale : {1.0f, 0x1p-30f}) {
      Random random(36);
      Weight weight = random_weight(random, {kIn, kIn, kIn / kGroup, bits, true, DType::f32});
      for (std::int64_t i = 0; i < kIn * kIn; ++i) weight.codes[i] = i / kIn == i % kIn ? 1 : 0;
      for (std::int64_t i = 0; i < weight.scale.size(); ++i) weight.scale.set(i, weight_scale);
      Activations x(DType::f32, kSteps, kIn);
      for (std::int64_t m = 0; m < kSteps; ++m)
        for (std::int64_t k = 0; k < kIn; ++k) {
          const float most = weight_scale == 1.0f ? std::ldexp(1.0f, static_cast<int>(m) - 140) : FLT_MAX;
          x.set(m, k, k % kGroup == 0 ? most : most * random.uniform(-1.0f, 1.0f));
        }
      for (const cpu::KernelTable* table : cpu::available_tables()) {
        const Panels panels = make_panels(weight, table->panel_rows);
        const Product out = run_kernel(*table, Compute::int16, panels, x, kSteps, {}, random);
        double worst = 0.0;
        for (std::int64_t i = 0; i < kSteps * kIn; ++i) {
          const double exact = double{x.get(i / kIn, i % kIn)} * weight_scale;
          const double step = std::max(std::fabs(double{x.get(i / kIn, 0)}) / 32258, 0x1p-118) * weight_scale;
          const double rounding = std::fabs(exact) * 0x1p-22;
          worst = std::max(worst, std::fabs(out.y.get(i) - exact) / (step / 2 + rounding));
        }
        INFO(table->name << " W" << bits << ", scale " << weight_scale);
        CHECK(worst <= 1.0);
      }
    }
}

TEST_CASE("qmatmul: NaN and infinity spoil their row and no other") {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for_all([&](const Shape& shape, Compute compute) {
    Random random(34);
    const Weight weight = random_weight(random, shape);
    for (const DType dtype : kFloatTypes) {
      Activations x = normal_activations(random, dtype, kRows, shape.k);
      const float bad[kRows] = {0, nan, 0, infinity, -infinity, 0, nan};
      const std::int64_t at[kRows] = {0, shape.k - 1, 0, shape.k / 2, shape.k - 1, 0, 0};
      for (std::int64_t m = 0; m < kRows; ++m)
        if (bad[m] != 0) x.set(m, at[m], bad[m]);
      for (const cpu::KernelTable* table : cpu::available_tables()) {
        const Product out = run_kernel(*table, compute, make_panels(weight, table->panel_rows), x, kRows, {}, random);
        std::int64_t wrong = 0;
        for (std::int64_t i = 0; i < kRows * kCols; ++i) {
          const float spoiler = bad[i / kCols], y = out.y.get(i);
          // In float mode an infinite input times a code of 0 is NaN, and infinite otherwise.
          const bool must_be_nan = compute != Compute::floating || std::isnan(spoiler);
          wrong += spoiler == 0 ? !std::isfinite(y) : must_be_nan ? !std::isnan(y) : std::isfinite(y);
        }
        INFO(table->name << " " << name_of(compute) << " " << shape.text() << ", " << name_of(dtype));
        CHECK(wrong == 0);
      }
    }
  });
}

TEST_CASE("qmatmul: without inputs the product is the bias") {
  Random random(35);
  const std::vector<float> bias{1.5f, -2.0f, 0.25f};
  const Weight weight{{3, 0, 1, 4, true, DType::f32}, {}, Floats(DType::f32, 3), {}};
  const Floats x(DType::f32, 0);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    auto buffer = prepacked(weight);
    for (const Compute compute : kModes) {
      for (const std::int64_t rows : {0, 1, 2, 5, 13}) {
        Floats y(DType::f32, rows * 3);
        for (std::int64_t i = 0; i < y.size(); ++i) y.set(i, 99.0f);
        auto values = bias;
        const TensorView bias_view = TensorView::vector(values.data(), DType::f32, 3);
        qmatmul(x.matrix(rows, 0), view(buffer), &bias_view, y.matrix(rows, 3), compute);
        INFO(isa << ", " << rows << " rows");
        for (std::int64_t i = 0; i < y.size(); ++i) CHECK(y.get(i) == bias[static_cast<std::size_t>(i % 3)]);
      }
    }
  }
}

}  // namespace qtale::test

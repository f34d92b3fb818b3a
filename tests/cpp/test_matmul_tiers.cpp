// qmatmul kernels of every tier against the definition in float64, over shapes, codecs and dtypes.
#include <algorithm>

#include "catch.h"
#include "matmul_oracle.h"

namespace qtale::test {
namespace {

constexpr std::int64_t kRows = 13, kCols = 130;

struct Grouping {
  std::int64_t k, groups;
};
constexpr Grouping kGroupings[] = {{1, 1},   {7, 1},    {33, 1},  {100, 1}, {576, 1}, {32, 1},
                                   {96, 3},  {576, 18}, {64, 1},  {192, 3}, {576, 9}, {96, 1},
                                   {288, 3}, {576, 6},  {128, 1}, {384, 3}, {256, 1}, {768, 3}};

std::vector<float> random_bias(Random& random, std::int64_t n) {
  std::vector<float> out(static_cast<std::size_t>(n));
  for (float& value : out) value = random.normal();
  return out;
}

struct Problem {
  Weight weight;
  Activations x;
  std::vector<float> bias;
};

// Compares the first `rows` x `n` of a problem; the outputs do not depend on what is beyond them.
void check_part(const cpu::KernelTable& table, Compute compute, const Problem& p, const Expected& expected,
                std::int64_t rows, std::int64_t n, Random& random) {
  const Panels panels = make_panels(p.weight.top(n), table.panel_rows);
  const std::vector<float> bias(p.bias.begin(), p.bias.begin() + (p.bias.empty() ? 0 : n));
  const Product product = run_kernel(table, compute, panels, p.x, rows, bias, random);
  const std::string wrong = product.overrun + compare(expected, product.y, rows, n);
  if (!wrong.empty())
    FAIL_CHECK(table.name << " " << name_of(compute) << " " << p.weight.shape.text() << ", "
                          << name_of(p.x.values.dtype()) << ", " << rows << " rows, " << n << " columns: " << wrong);
}

void check_shapes(Compute compute, const Problem& p, Random& random) {
  const Expected expected = expect(p.weight, p.x, compute, p.bias);
  for (const cpu::KernelTable* table : cpu::available_tables()) {
    if (table == &cpu::reference_table) {  // slow, and each of its outputs is one independent loop
      check_part(*table, compute, p, expected, 2, 17, random);
      continue;
    }
    for (std::int64_t rows = 0; rows <= kRows; ++rows) check_part(*table, compute, p, expected, rows, kCols, random);
    for (const std::int64_t n : {0, 1, 15, 16, 63, 64, 65}) {
      check_part(*table, compute, p, expected, kRows, n, random);
      check_part(*table, compute, p, expected, 1, n, random);
    }
  }
}

void check_tiers(int bits, Compute compute) {
  Random random(static_cast<std::uint64_t>(bits) * 3 + static_cast<std::uint64_t>(compute));
  int turn = 0;  // walks through the pairs of dtypes
  for (const Grouping& g : kGroupings) {
    for (const bool symmetric : {true, false}) {
      const DType dtype = kFloatTypes[turn % 3], scale_dtype = kFloatTypes[turn / 3 % 3];
      const bool biased = turn % 2 == 0;
      ++turn;
      const Shape shape{kCols, g.k, g.groups, bits, symmetric, scale_dtype};
      check_shapes(compute,
                   {random_weight(random, shape), normal_activations(random, dtype, kRows, g.k),
                    biased ? random_bias(random, kCols) : std::vector<float>{}},
                   random);
    }
  }
}

}  // namespace

TEST_CASE("qmatmul int8: every tier, 2 bits") { check_tiers(2, Compute::int8); }
TEST_CASE("qmatmul int8: every tier, 3 bits") { check_tiers(3, Compute::int8); }
TEST_CASE("qmatmul int8: every tier, 4 bits") { check_tiers(4, Compute::int8); }
TEST_CASE("qmatmul int8: every tier, 8 bits") { check_tiers(8, Compute::int8); }
TEST_CASE("qmatmul int16: every tier, 2 bits") { check_tiers(2, Compute::int16); }
TEST_CASE("qmatmul int16: every tier, 3 bits") { check_tiers(3, Compute::int16); }
TEST_CASE("qmatmul int16: every tier, 4 bits") { check_tiers(4, Compute::int16); }
TEST_CASE("qmatmul int16: every tier, 8 bits") { check_tiers(8, Compute::int16); }
TEST_CASE("qmatmul float: every tier, 2 bits") { check_tiers(2, Compute::floating); }
TEST_CASE("qmatmul float: every tier, 3 bits") { check_tiers(3, Compute::floating); }
TEST_CASE("qmatmul float: every tier, 4 bits") { check_tiers(4, Compute::floating); }
TEST_CASE("qmatmul float: every tier, 8 bits") { check_tiers(8, Compute::floating); }

TEST_CASE("qmatmul: every pair of activation and scale dtypes") {
  Random random(21);
  for (const int bits : kBits)
    for (const Grouping& g : {Grouping{100, 1}, Grouping{64, 2}, Grouping{256, 2}})
      for (const bool symmetric : {true, false})
        for (const DType dtype : kFloatTypes)
          for (const DType scale_dtype : kFloatTypes)
            for (const Compute compute : kModes) {
              const Problem p{random_weight(random, {33, g.k, g.groups, bits, symmetric, scale_dtype}),
                              normal_activations(random, dtype, 3, g.k), random_bias(random, 33)};
              const Expected expected = expect(p.weight, p.x, compute, p.bias);
              for (const cpu::KernelTable* table : cpu::available_tables())
                check_part(*table, compute, p, expected, 3, 33, random);
            }
}

TEST_CASE("qmatmul: every tier equals the reference kernel") {
  Random random(22);
  for (const int bits : kBits)
    for (const Grouping& g : {Grouping{100, 1}, Grouping{96, 3}, Grouping{384, 3}})
      for (const bool symmetric : {true, false})
        for (const Compute compute : kModes) {
          const Weight weight = random_weight(random, {66, g.k, g.groups, bits, symmetric, DType::f16});
          const Activations x = normal_activations(random, DType::f32, 4, g.k);
          const Product reference =
              run_kernel(cpu::reference_table, compute, make_panels(weight, 16), x, 4, {}, random);
          Expected expected = expect(weight, x, compute, {});  // for its bounds: both sides round
          for (std::size_t i = 0; i < expected.y.size(); ++i)
            expected.y[i] = reference.y.get(static_cast<std::int64_t>(i));
          for (const cpu::KernelTable* table : cpu::available_tables()) {
            const Panels panels = make_panels(weight, table->panel_rows);
            const Product product = run_kernel(*table, compute, panels, x, 4, {}, random);
            INFO(table->name << " " << weight.shape.text());
            CHECK(compare(expected, product.y, 4, 66) == "");
          }
        }
}

}  // namespace qtale::test

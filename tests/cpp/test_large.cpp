// Sizes that take other ways through the kernels: several tiles over long rows, and outputs written past the caches.
#include "catch.h"
#include "matmul_oracle.h"

namespace qtale::test {
namespace {

constexpr std::int64_t kMany[] = {14, 17, 23, 24, 25, 31, 49};

struct Grouping {
  std::int64_t k, groups;
};

void check_many_rows(const Shape& shape, Compute compute) {
  Random random(81);
  const Weight weight = random_weight(random, shape);
  const Activations x = normal_activations(random, DType::f32, 49, shape.k);
  const Expected expected = expect(weight, x, compute, {});
  for (const cpu::KernelTable* table : cpu::available_tables()) {
    if (table == &cpu::reference_table) continue;
    const Panels panels = make_panels(weight, table->panel_rows);
    for (const std::int64_t rows : kMany) {
      const Product product = run_kernel(*table, compute, panels, x, rows, {}, random);
      const std::string wrong = product.overrun + compare(expected, product.y, rows, shape.n);
      if (!wrong.empty())
        FAIL_CHECK(table->name << " " << name_of(compute) << " " << shape.text() << ", " << rows << " rows: " << wrong);
    }
  }
}

struct Quantized {
  Lines<std::int8_t> codes, zero;
  Floats scale, back, fake;
};

// All three row operators on one weight [rows, k].
Quantized run_operators(const cpu::KernelTable& table, const Floats& weight, std::int64_t rows, const Shape& shape) {
  const std::int64_t k = shape.k, group = k / shape.groups, size = rows * k;
  Quantized q{Lines<std::int8_t>(size), Lines<std::int8_t>(shape.symmetric ? 0 : rows * shape.groups),
              Floats(shape.scale_dtype, rows * shape.groups), Floats(weight.dtype(), size),
              Floats(weight.dtype(), size)};
  std::int8_t* zero = shape.symmetric ? nullptr : q.zero.data();
  const cpu::RowsIn input{weight.data(), weight.dtype(), k};
  const cpu::RowsOut back{q.back.data(), weight.dtype(), k}, fake{q.fake.data(), weight.dtype(), k};
  REQUIRE(table.quantize(
              {input, k, group, shape.groups, shape.bits, q.codes.data(), q.scale.data(), shape.scale_dtype, zero}, 0,
              rows) == -1);
  table.dequantize({q.codes.data(), q.scale.data(), shape.scale_dtype, zero, k, group, shape.groups, back}, 0, rows);
  table.fake_quantize({input, q.scale.data(), shape.scale_dtype, zero, k, group, shape.groups, shape.bits, fake}, 0,
                      rows);
  return q;
}

}  // namespace

TEST_CASE("large: several tiles over long rows") {
  for (const int bits : kBits)
    for (const Grouping& g : {Grouping{1000, 1}, Grouping{2176, 17}, Grouping{1536, 24}, Grouping{1056, 33}})
      for (const bool symmetric : {true, false})
        for (const Compute compute : kModes) check_many_rows({65, g.k, g.groups, bits, symmetric, DType::f16}, compute);
}

TEST_CASE("large: products written past the caches") {
  constexpr std::int64_t kM = 1030, kN = 2048, kK = 32;  // more than 8 MiB of float32
  Random random(82);
  const Weight weight = random_weight(random, {kN, kK, 1, 4, true, DType::f32});
  const Activations x = normal_activations(random, DType::f32, kM, kK);
  std::vector<float> bias(kN);
  for (float& value : bias) value = random.normal();
  const TensorView bias_view = TensorView::vector(bias.data(), DType::f32, kN);
  const Expected expected = expect(weight, x, Compute::int8, bias);
  for (const std::string& isa : cpu_isas()) {
    if (isa == "reference") continue;
    const IsaScope scope(isa);
    auto buffer = prepacked(weight);
    Floats y(DType::f32, kM * kN);
    qmatmul(x.view(kM), view(buffer), &bias_view, y.matrix(kM, kN), Compute::int8);
    INFO(isa);
    CHECK(compare(expected, y, kM, kN) == "");
  }
}

TEST_CASE("large: codes and weights written past the caches equal the reference") {
  constexpr std::int64_t kRows = 1030, kK = 1024;  // more than 1 MiB of codes
  Random random(83);
  for (const DType dtype : kFloatTypes) {
    const Floats weight = normal_floats(random, dtype, kRows * kK);
    for (const std::int64_t groups : {1, 8, 32})
      for (const bool symmetric : {true, false}) {
        const Shape shape{kRows, kK, groups, 4, symmetric, DType::f16};
        const Quantized expected = run_operators(cpu::reference_table, weight, kRows, shape);
        for (const cpu::KernelTable* table : cpu::available_tables()) {
          if (table == &cpu::reference_table) continue;
          const Quantized actual = run_operators(*table, weight, kRows, shape);
          INFO(table->name << ": " << shape.text() << ", " << name_of(dtype));
          CHECK((actual.codes == expected.codes && actual.zero == expected.zero));
          CHECK(first_difference(actual.scale, expected.scale) == -1);
          CHECK(first_difference(actual.back, expected.back) == -1);
          CHECK(first_difference(actual.fake, expected.fake) == -1);
        }
      }
  }
}

}  // namespace qtale::test

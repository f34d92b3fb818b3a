// Products that go on as they are stored: bit for bit what matmul and the operators after it give.
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "catch.h"
#include "tiled.h"

namespace qtale::test {
namespace {

constexpr std::int64_t kGap = 3;  // numbers between rows of y, which nobody writes

Floats gaps(DType dtype, std::int64_t rows, std::int64_t cols) {
  Floats y(dtype, rows * (cols + kGap));
  for (std::int64_t i = 0; i < y.size(); ++i) y.set(i, NAN);
  return y;
}
TensorView without_gaps(const Floats& y, std::int64_t rows, std::int64_t cols) {
  TensorView view = y.matrix(rows, cols + kGap);
  view.shape[1] = cols;
  return view;
}
// Numbers of y that differ, those in gaps that are not NaN among them.
std::int64_t wrong(const Floats& y, const Floats& expected, std::int64_t cols) {
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < y.size(); ++i) {
    const std::int64_t r = i / (cols + kGap), c = i % (cols + kGap);
    count += c < cols ? y.bits(i) != expected.bits(r * cols + c) : !std::isnan(y.get(i));
  }
  return count;
}

// A matrix in rows and, where its size allows that, in tiles.
std::vector<TensorView> forms_of(const Floats& weight, std::optional<Floats>& tiles, const Size& size) {
  std::vector<TensorView> forms{weight.matrix(size.out, size.in)};
  if (size.out % kTileOutputs != 0 || size.in % kTileInputs != 0) return forms;
  tiles = tiled(weight, size);
  forms.push_back(tiles_of(*tiles, size));
  return forms;
}

}  // namespace

TEST_CASE("gated_matmul: any form of weights, x and y has the bits of silu_mul") {
  Random random(204);
  std::vector<Size> sizes(std::begin(kSizes), std::end(kSizes));
  sizes.push_back({97, 130});
  for (const Size& size : sizes)
    for (const std::int64_t rows : {33, 64, 70, 300, 1030}) {
      const Floats gate = normal_floats(random, DType::f32, size.out * size.in, 0.1f);
      const Floats up = normal_floats(random, DType::f32, size.out * size.in, 0.1f);
      const Floats x = normal_floats(random, DType::f32, rows * size.in), half_x = rounded(x);
      with_tiles(2 * rows * size.out * size.in, [&](const std::string& isa) {
        const TensorView in = x.matrix(rows, size.in), half_in = half_x.matrix(rows, size.in);
        std::optional<Floats> gate_tiles, up_tiles;
        const std::vector<TensorView> gates = forms_of(gate, gate_tiles, size), ups = forms_of(up, up_tiles, size);
        Floats both(DType::f32, rows * 2 * size.out), expected(DType::f32, rows * size.out);
        for (int half = 0; half < 2; ++half) {
          const Floats part = product(in, half == 0 ? gates[0] : ups[0], nullptr, rows, size.out);
          for (std::int64_t i = 0; i < part.size(); ++i)
            both.set((i / size.out * 2 + half) * size.out + i % size.out, part.get(i));
        }
        silu_mul(both.matrix(rows, 2 * size.out), expected.matrix(rows, size.out));
        for (std::size_t form = 0; form < gates.size(); ++form)
          for (const TensorView& given : {in, half_in}) {
            const Floats y = gaps(DType::f32, rows, size.out), half_y = gaps(DType::bf16, rows, size.out);
            const auto multiply = [&](const Floats& to) {
              return gated_matmul(given, gates[form], ups[form], without_gaps(to, rows, size.out), Compute::bfloat16);
            };
            REQUIRE(multiply(y));
            REQUIRE(multiply(half_y));
            INFO(isa << " " << rows << " rows, " << size.out << " x " << size.in << ", form " << form);
            CHECK(wrong(y, expected, size.out) == 0);
            CHECK(wrong(half_y, rounded(expected), size.out) == 0);
          }
      });
    }
}

TEST_CASE("matmul_add: has the bits of matmul and an addition") {
  Random random(205);
  for (const Size& size : {Size{16, 32}, Size{97, 130}, Size{176, 608}, Size{300, 1400}, Size{304, 1408}})
    for (const std::int64_t rows : {33, 70, 600}) {
      const Floats weight = normal_floats(random, DType::f16, size.out * size.in);
      const Floats x = normal_floats(random, DType::f32, rows * size.in), half_x = rounded(x);
      const Floats before = normal_floats(random, DType::f32, rows * size.out);
      with_tiles(rows * size.out * size.in, [&](const std::string& isa) {
        std::optional<Floats> tiles;
        const std::vector<TensorView> forms = forms_of(weight, tiles, size);
        const Floats sums = product(x.matrix(rows, size.in), forms[0], nullptr, rows, size.out);
        Floats expected(DType::f32, sums.size());
        for (std::int64_t i = 0; i < sums.size(); ++i) expected.set(i, before.get(i) + sums.get(i));
        for (const TensorView& form : forms)
          for (const Floats* given : {&x, &half_x}) {
            Floats y = gaps(DType::f32, rows, size.out);
            for (std::int64_t i = 0; i < before.size(); ++i)
              y.set(i / size.out * (size.out + kGap) + i % size.out, before.get(i));
            REQUIRE(matmul_add(given->matrix(rows, size.in), form, without_gaps(y, rows, size.out), Compute::bfloat16));
            INFO(isa << " " << rows << " rows, " << size.out << " x " << size.in);
            CHECK(wrong(y, expected, size.out) == 0);
          }
      });
    }
}

TEST_CASE("matmul_add: does nothing where there are few rows or no such kernels") {
  Random random(206);
  for (const std::int64_t rows : {5, 33}) {
    const Floats x = normal_floats(random, DType::f32, rows * 64), weight = normal_floats(random, DType::bf16, 20 * 64);
    const Floats before = normal_floats(random, DType::f32, rows * 20);
    for (const std::string& isa : cpu_isas()) {
      const IsaScope scope(isa);
      for (const Compute way : {Compute::floating, Compute::bfloat16}) {
        Floats y = before;
        const bool done = matmul_add(x.matrix(rows, 64), weight.matrix(20, 64), y.matrix(rows, 20), way);
        INFO(isa << " " << name_of(way) << " " << rows << " rows");
        CHECK(done == (way == Compute::bfloat16 && (isa == "reference" || (isa == "avx512_amx" && rows > 32))));
        CHECK((first_difference(y, before) == -1) == !done);
      }
    }
  }
}

}  // namespace qtale::test

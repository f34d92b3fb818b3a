// qmatmul on AMX has exactly the bits of AVX-512: a row is the same in a batch, where tiles multiply it, and alone.
// What tiles read and write ends where it should, which sanitizers do not see.
#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>

#include "attention_oracle.h"
#include "catch.h"
#include "guarded.h"
#include "matmul_oracle.h"

namespace qtale::test {
namespace {

struct Grouping {
  std::int64_t k, groups;
};
// Per channel: tails of half a tile, and more inputs than are unpacked at once. Grouped: blocks of 32, 64 and 128, and
// last groups of activations with fewer blocks than the others.
constexpr Grouping kGroupings[] = {{7, 1},     {64, 1},    {100, 1}, {576, 1}, {2080, 1}, {4224, 1},
                                   {96, 3},    {288, 9},   {672, 7}, {192, 3}, {384, 6},  {2240, 35},
                                   {2400, 75}, {2304, 18}, {256, 1}, {768, 3}};

const cpu::KernelTable* table_of(const std::string& name) {
  for (const cpu::KernelTable* table : cpu::available_tables())
    if (table->name == name) return table;
  return nullptr;
}

constexpr Compute kRounded[] = {Compute::int8, Compute::int16};  // what tiles are for

void check_equal(const Weight& weight, const Activations& x, std::int64_t rows, const std::vector<float>& bias,
                 Random& random) {
  const Panels panels = make_panels(weight, table_of("avx512")->panel_rows);
  for (const Compute compute : kRounded) {
    const Product one = run_kernel(*table_of("avx512"), compute, panels, x, rows, bias, random);
    const Product other = run_kernel(*table_of("avx512_amx"), compute, panels, x, rows, bias, random);
    INFO(name_of(compute) << " " << weight.shape.text() << ", " << name_of(x.values.dtype()) << ", " << rows
                          << " rows");
    CHECK(other.overrun == "");
    CHECK(first_difference(one.y, other.y) == -1);
  }
}

void check_forms(int bits) {
  Random random(static_cast<std::uint64_t>(70 + bits));
  int turn = 0;  // walks through dtypes, columns and bias
  for (const Grouping& g : kGroupings)
    for (const bool symmetric : {true, false})
      for (const std::int64_t rows : {5, 9, 10, 12, 16, 28, 31, 32, 33, 64, 101, 193}) {
        const std::int64_t n = turn % 2 ? 130 : 63;
        const Shape shape{n, g.k, g.groups, bits, symmetric, kFloatTypes[turn / 3 % 3]};
        std::vector<float> bias(static_cast<std::size_t>(turn % 4 ? n : 0));
        for (float& value : bias) value = random.normal();
        const Activations x = normal_activations(random, kFloatTypes[turn++ % 3], rows, g.k);
        check_equal(random_weight(random, shape), x, rows, bias, random);
      }
}

Floats multiply(std::vector<std::uint8_t>& buffer, const Activations& x, std::int64_t rows, std::int64_t n,
                Compute compute) {
  Floats y(x.values.dtype(), rows * n);
  qmatmul(x.view(rows), view(buffer), nullptr, y.matrix(rows, n), compute);
  return y;
}

}  // namespace

TEST_CASE("amx: equals AVX-512 bit for bit, 2 bits", "[amx]") {
  if (has_amx()) check_forms(2);
}
TEST_CASE("amx: equals AVX-512 bit for bit, 3 bits", "[amx]") {
  if (has_amx()) check_forms(3);
}
TEST_CASE("amx: equals AVX-512 bit for bit, 4 bits", "[amx]") {
  if (has_amx()) check_forms(4);
}
TEST_CASE("amx: equals AVX-512 bit for bit, 8 bits", "[amx]") {
  if (has_amx()) check_forms(8);
}

TEST_CASE("amx: extreme codes, zero points and activations leave no room unused", "[amx]") {
  if (!has_amx()) return;
  Random random(81);
  for (const int bits : kBits)
    for (const Grouping& g : {Grouping{256, 1}, Grouping{256, 2}, Grouping{256, 4}, Grouping{256, 8}})
      for (const bool low : {true, false}) {
        const int most = (1 << (bits - 1)) - 1, least = -most - 1;
        Weight weight = random_weight(random, {64, g.k, g.groups, bits, false, DType::f32});
        std::fill(weight.codes.begin(), weight.codes.end(), static_cast<std::int8_t>(low ? least : most));
        std::fill(weight.zero.begin(), weight.zero.end(), static_cast<std::int8_t>(low ? most : least));
        Activations x(DType::f32, 40, g.k);
        for (std::int64_t i = 0; i < 40 * g.k; ++i) x.set(i / g.k, i % g.k, i / g.k % 2 ? 1.0f : -1.0f);
        check_equal(weight, x, 40, {}, random);
      }
}

TEST_CASE("amx: rows with NaN and infinity spoil themselves alone", "[amx]") {
  if (!has_amx()) return;
  Random random(82);
  for (const std::int64_t groups : {1, 2, 8}) {
    Activations x = normal_activations(random, DType::f32, 40, 256);
    x.set(3, 130, std::numeric_limits<float>::quiet_NaN());
    x.set(17, 2, std::numeric_limits<float>::infinity());
    check_equal(random_weight(random, {70, 256, groups, 4, false, DType::f16}), x, 40, {}, random);
  }
}

TEST_CASE("amx: any number of threads and of rows gives the bits of AVX-512, and of each row alone", "[amx][threads]") {
  if (!has_amx()) return;
  Random random(83);
  constexpr std::int64_t kM = 1100, kN = 200, kK = 320;  // three blocks of rows
  for (const std::int64_t groups : {1, 5}) {
    auto buffer = prepacked(random_weight(random, {kN, kK, groups, 4, true, DType::f16}));
    const Activations x = normal_activations(random, DType::f32, kM, kK);
    for (const Compute compute : kRounded)
      for (const std::int64_t rows : {1, 5, 6, 11, 12, 192, 193, 513, 1100}) {
        const Floats expected = [&] {
          const IsaScope scope("avx512");
          return multiply(buffer, x, rows, kN, compute);
        }();
        const IsaScope scope("avx512_amx");
        for (const int threads : {1, 2, 3}) {
          const ThreadScope pool(threads);
          INFO(name_of(compute) << ", " << groups << " groups, " << rows << " rows, " << threads << " threads");
          CHECK(first_difference(expected, multiply(buffer, x, rows, kN, compute)) == -1);
        }
      }
  }
}

#ifdef __linux__
TEST_CASE("amx: products of bf16 numbers end where their matrices do", "[amx]") {
  if (!has_amx()) return;
  Random random(85);
  const IsaScope scope("avx512_amx");
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
    for (const std::int64_t in : {2, 32, 34, 64, 258})
      for (const std::int64_t out : {15, 16, 17, 31, 33})
        for (const std::int64_t rows : {1, 4, 5, 16, 17, 32, 33}) {
          const Floats x = normal_floats(random, DType::f32, rows * in),
                       weight = normal_floats(random, dtype, out * in);
          Floats expected(DType::f32, rows * out);
          matmul(x.matrix(rows, in), weight.matrix(out, in), nullptr, expected.matrix(rows, out), Compute::bfloat16);
          const Guarded own_x(x.data(), x.size() * 4), own(weight.data(), weight.size() * size_of(dtype)),
              y(expected.size() * 4);
          const TensorView to = TensorView::matrix(y.data(), DType::f32, rows, out);
          matmul(TensorView::matrix(own_x.data(), DType::f32, rows, in), TensorView::matrix(own.data(), dtype, out, in),
                 nullptr, to, Compute::bfloat16);
          INFO(rows << " x " << in << " x " << out);
          CHECK(std::memcmp(y.data(), expected.data(), static_cast<std::size_t>(expected.size() * 4)) == 0);
        }
}

TEST_CASE("amx: attention ends where pages do", "[amx]") {
  if (!has_amx()) return;
  const IsaScope scope("avx512_amx");
  for (const DType dtype : {DType::s8, DType::f16, DType::f32})
    for (const std::int64_t dim : {16, 32, 64, 128}) {
      Random random(86);
      Cache cache(70, 1, dim, dtype);
      cache.fill(random);
      Attending attending{3, dim, 0.125f, {}, {}, {}, {}, {}};
      attending.compute = Compute::int8;
      add_causal(attending, random, cache, 30, 0);
      const std::vector<float> expected = attending.run();
      std::vector<std::unique_ptr<Guarded>> pages;
      std::vector<void*> places;
      for (const auto& page : cache.memory) {
        pages.push_back(std::make_unique<Guarded>(page.data(), static_cast<std::int64_t>(page.size())));
        places.push_back(pages.back()->data());
      }
      attending.runs[0].pages = places;
      INFO("heads of " << dim);
      CHECK(differences(expected.data(), attending.run().data(), std::ssize(expected)) == 0);
    }
}
#endif

#ifdef __x86_64__
TEST_CASE("amx: neither products nor attention leave tile registers in use", "[amx]") {
  if (!has_amx()) return;
  Random random(84);
  const IsaScope scope("avx512_amx");
  const ThreadScope pool(1);
  const auto in_use = [] {
    unsigned low = 0, high = 0;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
    return (low & (3u << 17)) != 0;
  };
  auto buffer = prepacked(random_weight(random, {64, 128, 1, 8, true, DType::f16}));
  multiply(buffer, normal_activations(random, DType::f32, 64, 128), 64, 64, Compute::int8);
  CHECK(!in_use());
  for (const std::int64_t rows : {1, 40}) {
    const Floats x = normal_floats(random, DType::f32, rows * 64), weight = normal_floats(random, DType::bf16, 50 * 64);
    Floats y(DType::f32, rows * 50);
    matmul(x.matrix(rows, 64), weight.matrix(50, 64), nullptr, y.matrix(rows, 50), Compute::bfloat16);
    CHECK(!in_use());
  }
  Cache cache(100, 1, 64, DType::s8);
  cache.fill(random);
  Attending attending{2, 64, 0.125f, {}, {}, {}, {}, {}};
  add_causal(attending, random, cache, 20, 0);
  attending.run();
  CHECK(!in_use());
}
#endif

}  // namespace qtale::test

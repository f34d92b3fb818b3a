// The AMX tier has exactly the bits of AVX-512: a row is the same in a batch, where tiles multiply it, and alone.
#include <algorithm>
#include <limits>

#include "attention_oracle.h"
#include "catch.h"
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

// Whether this CPU has the tier; says so where it has not.
bool has_amx() {
  if (table_of("avx512_amx") != nullptr) return true;
  WARN("skipped: this CPU or its system has no AMX");
  return false;
}

void check_equal(const Weight& weight, const Activations& x, std::int64_t rows, const std::vector<float>& bias,
                 Random& random) {
  const Panels panels = make_panels(weight, table_of("avx512")->panel_rows);
  const Product one = run_kernel(*table_of("avx512"), Compute::int8, panels, x, rows, bias, random);
  const Product other = run_kernel(*table_of("avx512_amx"), Compute::int8, panels, x, rows, bias, random);
  INFO(weight.shape.text() << ", " << name_of(x.values.dtype()) << ", " << rows << " rows");
  CHECK(other.overrun == "");
  CHECK(first_difference(one.y, other.y) == -1);
}

void check_forms(int bits) {
  Random random(static_cast<std::uint64_t>(70 + bits));
  int turn = 0;  // walks through dtypes, columns and bias
  for (const Grouping& g : kGroupings)
    for (const bool symmetric : {true, false})
      for (const std::int64_t rows : {20, 31, 32, 33, 64, 101}) {
        const std::int64_t n = turn % 2 ? 130 : 63;
        const Shape shape{n, g.k, g.groups, bits, symmetric, kFloatTypes[turn / 3 % 3]};
        std::vector<float> bias(static_cast<std::size_t>(turn % 4 ? n : 0));
        for (float& value : bias) value = random.normal();
        const Activations x = normal_activations(random, kFloatTypes[turn++ % 3], rows, g.k);
        check_equal(random_weight(random, shape), x, rows, bias, random);
      }
}

Floats multiply(std::vector<std::uint8_t>& buffer, const Activations& x, std::int64_t rows, std::int64_t n) {
  Floats y(x.values.dtype(), rows * n);
  qmatmul(x.view(rows), view(buffer), nullptr, y.matrix(rows, n), Compute::int8);
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
    for (const std::int64_t rows : {1, 19, 20, 21, 513, 1100}) {
      const Floats expected = [&] {
        const IsaScope scope("avx512");
        return multiply(buffer, x, rows, kN);
      }();
      const IsaScope scope("avx512_amx");
      for (const int threads : {1, 2, 3}) {
        const ThreadScope pool(threads);
        INFO(groups << " groups, " << rows << " rows, " << threads << " threads");
        CHECK(first_difference(expected, multiply(buffer, x, rows, kN)) == -1);
      }
    }
  }
}

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
  multiply(buffer, normal_activations(random, DType::f32, 64, 128), 64, 64);
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

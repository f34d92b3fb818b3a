// quantize, dequantize and fake_quantize of every tier equal the reference bit for bit.
#include <cmath>
#include <limits>

#include "catch.h"
#include "support.h"

namespace qtale::test {
namespace {

struct Case {
  std::int64_t rows, k, group;
};
constexpr Case kCases[] = {{9, 1, 1},    {9, 7, 7},   {9, 33, 33}, {9, 100, 100}, {9, 576, 576},
                           {9, 576, 64}, {9, 96, 32}, {9, 96, 96}, {9, 384, 128}, {9, 512, 256},
                           {9, 60, 20},  {0, 64, 32}, {3, 0, 0}};
constexpr std::int64_t kGap = 3;       // elements between rows, which nobody may touch
constexpr float kSentinel = -1280.0f;  // exact in all dtypes

// Rows of each kind that rounding treats differently.
Floats make_rows(Random& random, DType dtype, const Case& c) {
  Floats out(dtype, c.rows * (c.k + kGap));
  for (std::int64_t r = 0; r < c.rows; ++r) {
    for (std::int64_t i = 0; i < c.k + kGap; ++i) {
      const float z = random.normal();
      const float kinds[] = {z,         0.0f,     std::fabs(z), -0.7f, z * 1e-30f, z * 8000.0f, std::rint(z * 4) * 0.5f,
                             z * 1e-7f, z * z * z};
      out.set(r * (c.k + kGap) + i, i < c.k ? kinds[r % 9] : kSentinel);
    }
  }
  return out;
}

std::int64_t groups_of(const Case& c) { return c.group > 0 ? c.k / c.group : 1; }

struct Quantized {
  std::int64_t bad_row;
  std::vector<std::int8_t> codes;
  Floats scale;
  std::vector<std::int8_t> zero;
};

Quantized run_quantize(const cpu::KernelTable& table, const Floats& rows, const Case& c, int bits, bool symmetric,
                       DType scale_dtype) {
  const std::int64_t params = c.rows * groups_of(c);
  Quantized out{0, std::vector<std::int8_t>(c.rows * c.k), Floats(scale_dtype, params), {}};
  if (!symmetric) out.zero.resize(params);
  const cpu::RowsIn input{rows.data(), rows.dtype(), c.k + kGap};
  out.bad_row = table.quantize({input, c.k, c.group, groups_of(c), bits, out.codes.data(), out.scale.data(),
                                scale_dtype, symmetric ? nullptr : out.zero.data()},
                               0, c.rows);
  return out;
}

Floats run_fake_quantize(const cpu::KernelTable& table, const Floats& x, const Quantized& q, const Case& c, int bits) {
  Floats out(x.dtype(), x.size());
  for (std::int64_t i = 0; i < out.size(); ++i) out.set(i, kSentinel);
  const cpu::RowsIn input{x.data(), x.dtype(), c.k + kGap};
  const cpu::RowsOut output{out.data(), out.dtype(), c.k + kGap};
  table.fake_quantize({input, q.scale.data(), q.scale.dtype(), q.zero.empty() ? nullptr : q.zero.data(), c.k, c.group,
                       groups_of(c), bits, output},
                      0, c.rows);
  return out;
}

Floats run_dequantize(const cpu::KernelTable& table, const Quantized& q, const Case& c, DType dtype) {
  Floats out(dtype, c.rows * (c.k + kGap));
  for (std::int64_t i = 0; i < out.size(); ++i) out.set(i, kSentinel);
  const cpu::RowsOut output{out.data(), dtype, c.k + kGap};
  table.dequantize({q.codes.data(), q.scale.data(), q.scale.dtype(), q.zero.empty() ? nullptr : q.zero.data(), c.k,
                    c.group, groups_of(c), output},
                   0, c.rows);
  return out;
}

// Calls fn for every case, bit width, symmetry, pair of dtypes and tier.
template <class Fn>
void for_all(Fn&& fn) {
  for (const Case& c : kCases)
    for (const int bits : kBits)
      for (const bool symmetric : {true, false})
        for (const DType dtype : kFloatTypes)
          for (const DType scale : kFloatTypes)
            for (const cpu::KernelTable* table : cpu::available_tables()) {
              INFO(table->name << ": " << c.rows << "x" << c.k << " by " << c.group << ", " << bits << " bits, "
                               << name_of(dtype) << ", scales " << name_of(scale) << (symmetric ? "" : ", zeros"));
              fn(*table, c, bits, symmetric, dtype, scale);
            }
}

}  // namespace

TEST_CASE("quantize: every tier equals the reference bit for bit") {
  for_all([](const cpu::KernelTable& table, const Case& c, int bits, bool symmetric, DType dtype, DType scale) {
    Random random(11);
    const Floats rows = make_rows(random, dtype, c);
    const Quantized expected = run_quantize(cpu::reference_table, rows, c, bits, symmetric, scale);
    const Quantized actual = run_quantize(table, rows, c, bits, symmetric, scale);
    REQUIRE(expected.bad_row == -1);
    CHECK(actual.bad_row == -1);
    CHECK(actual.codes == expected.codes);
    CHECK(actual.zero == expected.zero);
    CHECK(first_difference(actual.scale, expected.scale) == -1);
  });
}

TEST_CASE("dequantize: every tier equals the reference bit for bit and keeps between rows") {
  for_all([](const cpu::KernelTable& table, const Case& c, int bits, bool symmetric, DType dtype, DType scale) {
    Random random(12);
    Quantized q = run_quantize(cpu::reference_table, make_rows(random, DType::f32, c), c, bits, symmetric, scale);
    for (auto& code : q.codes) code = static_cast<std::int8_t>(random.integer(-128, 127));
    const Floats expected = run_dequantize(cpu::reference_table, q, c, dtype);
    CHECK(first_difference(run_dequantize(table, q, c, dtype), expected) == -1);
    for (std::int64_t r = 0; r < c.rows; ++r)
      if (expected.get(r * (c.k + kGap) + c.k) != kSentinel) FAIL_CHECK("the gap after row " << r << " was written");
  });
}

TEST_CASE("fake_quantize: every tier equals the reference bit for bit for all inputs") {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for_all([&](const cpu::KernelTable& table, const Case& c, int bits, bool symmetric, DType dtype, DType scale) {
    Random random(13);
    const Quantized q = run_quantize(cpu::reference_table, make_rows(random, DType::f32, c), c, bits, symmetric, scale);
    Floats x = make_rows(random, dtype, c);
    const float special[] = {infinity, -infinity, nan, -0.0f, 3e38f, -3e38f, 1e-40f};
    for (std::int64_t i = 0; i < x.size(); i += 5) x.set(i, special[i / 5 % 7]);
    const Floats expected = run_fake_quantize(cpu::reference_table, x, q, c, bits);
    CHECK(first_difference(run_fake_quantize(table, x, q, c, bits), expected) == -1);
  });
}

TEST_CASE("fake_quantize: equals dequantize of quantize") {
  const Case c{9, 384, 128};
  for (const int bits : kBits) {
    Random random(14);
    const Floats rows = make_rows(random, DType::f32, c);
    for (const bool symmetric : {true, false}) {
      const Quantized q = run_quantize(cpu::reference_table, rows, c, bits, symmetric, DType::f16);
      const Floats direct = run_fake_quantize(cpu::reference_table, rows, q, c, bits);
      CHECK(first_difference(direct, run_dequantize(cpu::reference_table, q, c, DType::f32)) == -1);
    }
  }
}

TEST_CASE("quantize: follows its definition") {
  // amax / 7.5 = 0.5, so codes are halves of the weights rounded to even.
  Floats rows(DType::f32, 9);
  const float values[] = {3.75f, -3.75f, 0.25f, 0.75f, -0.3f, 1.0f};
  for (int i = 0; i < 6; ++i) rows.set(i, values[i]);
  const Quantized symmetric = run_quantize(cpu::reference_table, rows, {1, 6, 6}, 4, true, DType::f32);
  CHECK(symmetric.scale.get(0) == 0.5f);
  CHECK(symmetric.codes == std::vector<std::int8_t>{7, -8, 0, 2, -1, 2});
  // The range [-1, 6.5] has a step of 0.5; -1 is code -8, so zero is code -6.
  const float shifted[] = {-1.0f, 6.5f, 0.0f, 0.5f, 2.2f, 6.0f};
  for (int i = 0; i < 6; ++i) rows.set(i, shifted[i]);
  const Quantized asymmetric = run_quantize(cpu::reference_table, rows, {1, 6, 6}, 4, false, DType::f32);
  CHECK(asymmetric.scale.get(0) == 0.5f);
  CHECK(asymmetric.zero == std::vector<std::int8_t>{-6});
  CHECK(asymmetric.codes == std::vector<std::int8_t>{-8, 7, -6, -5, -2, 6});
}

TEST_CASE("quantize: every tier names the row that it cannot code") {
  const float infinity = std::numeric_limits<float>::infinity();
  const Case c{5, 100, 100};
  for (const cpu::KernelTable* table : cpu::available_tables()) {
    for (const float bad : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
      for (const std::int64_t at : {0, 15, 63, 96, 99}) {
        Random random(15);
        for (const DType dtype : kFloatTypes) {
          Floats rows = make_rows(random, dtype, c);
          rows.set(3 * (c.k + kGap) + at, bad);
          INFO(table->name << ", " << bad << " at " << at << " in " << name_of(dtype));
          CHECK(run_quantize(*table, rows, c, 4, true, DType::f32).bad_row == 3);
          CHECK(run_quantize(*table, rows, c, 8, false, DType::f16).bad_row == 3);
        }
      }
    }
    Floats rows(DType::f32, c.rows * (c.k + kGap));
    rows.set(2 * (c.k + kGap) + 50, 1e6f);
    CHECK(run_quantize(*table, rows, c, 2, true, DType::f16).bad_row == 2);
    CHECK(run_quantize(*table, rows, c, 2, true, DType::bf16).bad_row == -1);
  }
}

}  // namespace qtale::test

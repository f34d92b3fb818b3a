// matmul on every instruction set, in float and in bfloat16 where it is there, against float64: shapes, dtypes, bias,
// rows apart, NaN, threads, numbers of rows.
#include <cmath>
#include <limits>
#include <vector>

#include "catch.h"
#include "qtale/decoder_ops.h"
#include "qtale/device.h"
#include "support.h"

namespace qtale::test {
namespace {

struct Case {
  std::int64_t rows, in, out;
};

// Rows, depths and outputs around the tiles, groups and blocks of every tier.
const Case kCases[] = {{1, 1, 1},      {1, 576, 97},   {2, 16, 97},  {3, 33, 12},   {4, 513, 7},    {5, 100, 31},
                       {6, 15, 200},   {7, 600, 13},   {9, 48, 96},  {12, 31, 103}, {13, 31, 103},  {16, 64, 6},
                       {17, 130, 193}, {31, 1030, 25}, {32, 16, 96}, {33, 257, 97}, {49, 512, 385}, {65, 1537, 11},
                       {4, 0, 9},      {40, 0, 100},   {0, 5, 3},    {20, 7, 0},    {600, 20, 5}};

// The ways in which the tier in use multiplies rows of so many numbers.
std::vector<Compute> ways(std::int64_t in) {
  if (has_bfloat16() && in % 2 == 0) return {Compute::floating, Compute::bfloat16};
  return {Compute::floating};
}

Floats multiply(const Floats& x, const Floats& weight, const Floats* bias, const Case& c, Compute way) {
  Floats y(DType::f32, c.rows * c.out);
  for (std::int64_t i = 0; i < y.size(); ++i) y.set(i, NAN);
  const TensorView bias_view = bias == nullptr ? TensorView{} : bias->vector();
  matmul(x.matrix(c.rows, c.in), weight.matrix(c.out, c.in), bias == nullptr ? nullptr : &bias_view,
         y.matrix(c.rows, c.out), way);
  return y;
}

Floats rounded(const Floats& x, Compute way) {
  if (way != Compute::bfloat16) return x;
  Floats out(DType::bf16, x.size());
  for (std::int64_t i = 0; i < x.size(); ++i) out.set(i, x.get(i));
  return out;
}

// Elements of y outside of the bound that decoder_ops.h states.
std::int64_t outside(const Floats& given_x, const Floats& given_weight, const Floats* bias, const Case& c,
                     Compute way) {
  const Floats y = multiply(given_x, given_weight, bias, c, way);
  const Floats x = rounded(given_x, way), weight = rounded(given_weight, way);
  std::int64_t wrong = 0;
  for (std::int64_t r = 0; r < c.rows; ++r) {
    for (std::int64_t o = 0; o < c.out; ++o) {
      double exact = bias == nullptr ? 0.0 : double{bias->get(o)}, size = std::fabs(exact);
      for (std::int64_t i = 0; i < c.in; ++i) {
        const double product = double{x.get(r * c.in + i)} * double{weight.get(o * c.in + i)};
        exact += product;
        size += std::fabs(product);
      }
      const double bound = static_cast<double>(c.in + 8) * 0x1p-24 * size;
      wrong += !(std::fabs(y.get(r * c.out + o) - exact) <= bound);
    }
  }
  return wrong;
}

Floats head(const Floats& x, std::int64_t size) {
  Floats out(x.dtype(), size);
  for (std::int64_t i = 0; i < size; ++i) out.set(i, x.get(i));
  return out;
}

}  // namespace

TEST_CASE("matmul: within the stated bound of float64 for all tiers, dtypes and shapes") {
  Random random(91);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const Case& c : kCases) {
      for (const DType dtype : kFloatTypes) {
        const Floats x = normal_floats(random, DType::f32, c.rows * c.in);
        const Floats weight = normal_floats(random, dtype, c.out * c.in, 0.1f);
        const Floats bias = normal_floats(random, DType::f32, c.out);
        for (const Compute way : ways(c.in)) {
          INFO(isa << " " << name_of(way) << " " << name_of(dtype) << " x [" << c.rows << ", " << c.in << "], " << c.out
                   << " outputs");
          CHECK(outside(x, weight, nullptr, c, way) == 0);
          CHECK(outside(x, weight, &bias, c, way) == 0);
        }
      }
    }
  }
}

TEST_CASE("matmul: a row has the same bits among any number of rows") {
  Random random(92);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const std::int64_t in : {7, 16, 34, 576, 700, 1041, 2050}) {
      for (const DType dtype : kFloatTypes) {
        const Case all{70, in, 101};
        const Floats x = normal_floats(random, DType::f32, all.rows * in);
        const Floats weight = normal_floats(random, dtype, all.out * in), bias = normal_floats(random, DType::f32, 101);
        for (const Compute way : ways(in)) {
          const Floats y = multiply(x, weight, &bias, all, way);
          for (const std::int64_t rows : {1, 2, 3, 4, 5, 6, 7, 12, 13, 16, 17, 33, 64}) {
            const Floats some = multiply(head(x, rows * in), weight, &bias, {rows, in, all.out}, way);
            INFO(isa << " " << name_of(way) << " " << name_of(dtype) << " " << rows << " rows, " << in << " deep");
            CHECK(first_difference(some, head(y, rows * all.out)) == -1);
          }
        }
      }
    }
  }
}

TEST_CASE("matmul: the same bits for any number of threads", "[threads]") {
  Random random(93);
  for (const std::string& isa : cpu_isas()) {
    if (isa == "reference") continue;
    const IsaScope scope(isa);
    for (const std::int64_t rows : {1, 4, 40}) {
      const Case c{rows, 576, 3000};
      const Floats x = normal_floats(random, DType::f32, c.rows * c.in);
      const Floats weight = normal_floats(random, DType::bf16, c.out * c.in);
      for (const Compute way : ways(c.in)) {
        const Floats one = [&] {
          const ThreadScope threads(1);
          return multiply(x, weight, nullptr, c, way);
        }();
        for (const int count : {2, 3, 7}) {
          const ThreadScope threads(count);
          INFO(isa << " " << name_of(way) << " " << rows << " rows, " << count << " threads");
          CHECK(first_difference(multiply(x, weight, nullptr, c, way), one) == -1);
        }
      }
    }
  }
}

struct Apart {
  std::int64_t rows, in;
  DType dtype;
};
const Apart kApart[] = {
    {3, 40, DType::f16}, {50, 40, DType::f16}, {3, 64, DType::bf16}, {20, 64, DType::bf16}, {50, 64, DType::bf16}};

TEST_CASE("matmul: rows may be apart, and nothing between them is read into sums or written") {
  Random random(94);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const auto& [rows, in, dtype] : kApart) {
      const Case c{rows, in, 230};
      const Floats x = normal_floats(random, DType::f32, rows * in), weight = normal_floats(random, dtype, 230 * in);
      Floats wide_x(DType::f32, rows * (in + 5)), wide(dtype, 230 * (in + 3)), y(DType::f32, rows * 233);
      for (Floats* gaps : {&wide_x, &wide, &y})
        for (std::int64_t i = 0; i < gaps->size(); ++i) gaps->set(i, NAN);
      for (std::int64_t i = 0; i < x.size(); ++i) wide_x.set(i / in * (in + 5) + i % in, x.get(i));
      for (std::int64_t i = 0; i < weight.size(); ++i) wide.set(i / in * (in + 3) + i % in, weight.get(i));
      TensorView apart_x = wide_x.matrix(rows, in + 5), apart = wide.matrix(230, in + 3), apart_y = y.matrix(rows, 233);
      apart_x.shape[1] = apart.shape[1] = in;
      apart_y.shape[1] = 230;
      for (const Compute way : ways(in)) {
        matmul(apart_x, apart, nullptr, apart_y, way);
        const Floats dense = multiply(x, weight, nullptr, c, way);
        std::int64_t wrong = 0;
        for (std::int64_t i = 0; i < y.size(); ++i)
          wrong += i % 233 < 230 ? y.bits(i) != dense.bits(i / 233 * 230 + i % 233) : !std::isnan(y.get(i));
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("matmul: NaN and infinity reach their own products only") {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  Random random(95);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const std::int64_t rows : {2, 30, 70}) {
      const Case c{rows, 50, 40};
      Floats x(DType::f32, rows * 50), weight(DType::bf16, 40 * 50);
      for (std::int64_t i = 0; i < x.size(); ++i) x.set(i, random.uniform(1.0f, 2.0f));
      for (std::int64_t i = 0; i < weight.size(); ++i) weight.set(i, random.uniform(1.0f, 2.0f));
      x.set(0 * 50 + 49, -kInf);
      weight.set(3 * 50 + 8, NAN);
      weight.set(4 * 50 + 17, kInf);
      for (const Compute way : ways(50)) {
        const Floats y = multiply(x, weight, nullptr, c, way);
        std::int64_t wrong = 0;
        for (std::int64_t i = 0; i < y.size(); ++i) {
          const bool first = i / 40 == 0;
          const std::int64_t o = i % 40;
          if (o == 3 || (o == 4 && first))
            wrong += !std::isnan(y.get(i));
          else if (o == 4)
            wrong += y.get(i) != kInf;
          else
            wrong += first ? y.get(i) != -kInf : !std::isfinite(y.get(i));
        }
        INFO(isa << " " << name_of(way) << " " << rows << " rows");
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("matmul: many deep rows have the bits of few") {
  Random random(96);
  const Case all{300, 1400, 300};
  const Floats x = normal_floats(random, DType::f32, all.rows * all.in);
  for (const DType dtype : kFloatTypes) {
    const Floats weight = normal_floats(random, dtype, all.out * all.in);
    for (const std::string& isa : cpu_isas()) {
      if (isa == "reference") continue;
      const IsaScope scope(isa);
      for (const Compute way : ways(all.in)) {
        const Floats together = multiply(x, weight, nullptr, all, way);
        Floats some(DType::f32, 20 * all.in);
        for (std::int64_t i = 0; i < some.size(); ++i) some.set(i, x.get(270 * all.in + i));
        const Floats few = multiply(some, weight, nullptr, {20, all.in, all.out}, way);
        std::int64_t wrong = 0;
        for (std::int64_t i = 0; i < few.size(); ++i) wrong += few.bits(i) != together.bits(270 * all.out + i);
        INFO(isa << " " << name_of(way) << " " << name_of(dtype));
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("gated_matmul: has the bits of silu_mul of both products, or does nothing") {
  Random random(98);
  for (const Case& c : {Case{5, 64, 40}, {33, 64, 16}, {64, 130, 97}, {100, 576, 40}, {300, 1400, 150}, {7700, 2, 5}}) {
    const Floats x = normal_floats(random, DType::f32, c.rows * c.in);
    for (const DType dtype : kFloatTypes) {
      const Floats both = normal_floats(random, dtype, 2 * c.out * c.in);
      TensorView gate = both.matrix(2 * c.out, c.in), up = gate;
      gate.shape[0] = up.shape[0] = c.out;
      up.data = static_cast<std::byte*>(up.data) + c.out * c.in * size_of(dtype);
      for (const std::string& isa : cpu_isas()) {
        if (isa == "reference") continue;
        const IsaScope scope(isa);
        for (const Compute way : ways(c.in)) {
          Floats y(DType::f32, c.rows * c.out), expected(DType::f32, c.rows * c.out);
          const bool done = gated_matmul(x.matrix(c.rows, c.in), gate, up, y.matrix(c.rows, c.out), way);
          INFO(isa << " " << name_of(way) << " " << name_of(dtype) << " " << c.rows << " rows");
          CHECK(done == (isa == "avx512_amx" && way == Compute::bfloat16 && c.rows > 32));
          if (done) {
            const Floats products = multiply(x, both, nullptr, {c.rows, c.in, 2 * c.out}, way);
            silu_mul(products.matrix(c.rows, 2 * c.out), expected.matrix(c.rows, c.out));
          }
          CHECK(first_difference(expected, y) == -1);
        }
      }
    }
  }
  const Floats x(DType::f32, 8), gate(DType::bf16, 8), up(DType::f16, 8), y(DType::f32, 4);
  CHECK(input_error_of([&] {
          gated_matmul(x.matrix(2, 4), gate.matrix(2, 4), up.matrix(2, 4), y.matrix(2, 2), Compute::floating);
        }).find("use one dtype") != std::string::npos);
}

TEST_CASE("matmul: bfloat16 is refused where it cannot be had") {
  Floats x(DType::f32, 6), weight(DType::bf16, 6), y(DType::f32, 4);
  const auto refused = [&](std::int64_t in) {
    return input_error_of(
        [&] { matmul(x.matrix(2, in), weight.matrix(2, in), nullptr, y.matrix(2, 2), Compute::bfloat16); });
  };
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    INFO(isa);
    if (has_bfloat16()) {
      CHECK(refused(2).empty());
      CHECK(refused(3) ==
            "matmul: bfloat16 numbers are multiplied by pairs, but there are 3 features; compute in float.");
    } else {
      CHECK(refused(2) ==
            "matmul: " + isa + " has no products of bfloat16 numbers (AVX-512 BF16 has); compute in float.");
    }
  }
}

TEST_CASE("matmul: wrong arguments are refused in a sentence") {
  Floats x(DType::f32, 6), half(DType::f16, 6), weight(DType::f16, 12), y(DType::f32, 8), bias(DType::f32, 3);
  const auto refused = [&](const TensorView& x_view, const TensorView& weight_view, const TensorView* bias_view,
                           const TensorView& y_view) {
    return input_error_of([&] { matmul(x_view, weight_view, bias_view, y_view); });
  };
  const TensorView good_x = x.matrix(2, 3), good = weight.matrix(4, 3), good_y = y.matrix(2, 4);
  const TensorView short_bias = bias.vector(), matrix_bias = bias.matrix(1, 3), half_bias = half.vector();
  TensorView columns = weight.matrix(3, 4);
  std::swap(columns.shape[0], columns.shape[1]);
  std::swap(columns.strides[0], columns.strides[1]);
  CHECK(refused(good_x, good, nullptr, good_y).empty());
  CHECK(refused(half.matrix(2, 3), good, nullptr, good_y) == "matmul: x is float16; expected float32.");
  CHECK(refused(x.vector(), good, nullptr, good_y) == "matmul: x has shape [6]; expected a matrix.");
  CHECK(refused(x.matrix(3, 2), good, nullptr, good_y) == "matmul: x has 2 features; the weight takes 3.");
  CHECK(refused(good_x, columns, nullptr, good_y).find("matmul: the rows of weight are not contiguous") == 0);
  CHECK(refused(good_x, good, nullptr, y.matrix(4, 2)) == "matmul: y has shape [4, 2]; expected [2, 4].");
  CHECK(refused(good_x, good, &short_bias, good_y) == "matmul: bias has shape [3]; expected [4].");
  CHECK(refused(good_x, good, &matrix_bias, good_y) == "matmul: bias has shape [1, 3]; expected [4].");
  CHECK(refused(good_x, good, &half_bias, good_y) == "matmul: bias is float16; expected float32.");
}

}  // namespace qtale::test

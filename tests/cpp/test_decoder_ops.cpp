// rms_norm, rope and silu_mul on every instruction set against float64, on rows that lie apart; refusals.
#include <cmath>
#include <limits>

#include "catch.h"
#include "qtale/decoder_ops.h"
#include "support.h"

namespace qtale::test {
namespace {

constexpr std::int64_t kSizes[] = {1, 2, 7, 8, 16, 20, 33, 64, 129, 576, 2048};

// [rows, heads, n] with room after every row and head.
TensorView apart(std::vector<float>& data, std::int64_t rows, std::int64_t heads, std::int64_t n) {
  const std::int64_t head_stride = n + 3, row_stride = heads * head_stride + 5;
  data.assign(static_cast<std::size_t>(rows * row_stride), -7.0f);
  return {data.data(), DType::f32, 3, {rows, heads, n}, {row_stride, head_stride, 1}, {}};
}

float& at(const TensorView& t, std::int64_t r, std::int64_t h, std::int64_t i) {
  return t.as<float>()[r * t.strides[0] + h * t.strides[1] + i];
}

template <class Fn>
void each(const TensorView& t, Fn&& fn) {
  for (std::int64_t r = 0; r < t.shape[0]; ++r)
    for (std::int64_t h = 0; h < t.shape[1]; ++h)
      for (std::int64_t i = 0; i < t.shape[2]; ++i) fn(r, h, i);
}

// How many elements of the buffer the view does not name have changed.
std::int64_t touched_outside(const std::vector<float>& data, const TensorView& t) {
  std::int64_t named = t.numel(), untouched = 0;
  for (const float x : data) untouched += x == -7.0f;
  return static_cast<std::int64_t>(data.size()) - named - untouched;
}

double norm_error(const TensorView& x, const Floats& weight, double eps, const TensorView& out) {
  double worst = 0.0;
  each(x, [&](std::int64_t r, std::int64_t h, std::int64_t i) {
    double squares = 0.0;
    for (std::int64_t j = 0; j < x.shape[2]; ++j) squares += double{at(x, r, h, j)} * at(x, r, h, j);
    const double exact = at(x, r, h, i) / std::sqrt(squares / static_cast<double>(x.shape[2]) + eps) * weight.get(i);
    worst = std::max(worst, std::fabs(at(out, r, h, i) - exact) / std::max(1e-30, std::fabs(exact)));
  });
  return worst;
}

}  // namespace

TEST_CASE("rms_norm: the exact result but for rounding, for all tiers and sizes, in place too") {
  for (const std::int64_t n : kSizes) {
    Random random(21);
    std::vector<float> from, to;
    const TensorView x = apart(from, 3, 2, n);
    each(x, [&](auto r, auto h, auto i) { at(x, r, h, i) = random.normal() * (r == 2 ? 1e-4f : 30.0f); });
    const Floats weight = normal_floats(random, DType::f32, n);
    for (const std::string& isa : cpu_isas()) {
      const IsaScope scope(isa);
      INFO(isa << ", " << n);
      const TensorView out = apart(to, 3, 2, n);
      rms_norm(x, weight.vector(), 1e-5f, out);
      CHECK(norm_error(x, weight, double{1e-5f}, out) <= (static_cast<double>(n) / 2 + 6) * 0x1p-24);
      CHECK(touched_outside(to, out) == 0);
      std::vector<float> same = from;
      TensorView in_place = x;
      in_place.data = same.data();
      rms_norm(in_place, weight.vector(), 1e-5f, in_place);
      std::int64_t different = 0;
      each(x, [&](auto r, auto h, auto i) { different += at(in_place, r, h, i) != at(out, r, h, i); });
      CHECK(different == 0);
    }
  }
}

TEST_CASE("rms_norm: rows of a matrix") {
  Random random(22);
  const Floats x = normal_floats(random, DType::f32, 5 * 40), weight = normal_floats(random, DType::f32, 40);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    const Floats whole(DType::f32, 5 * 40), row(DType::f32, 40);
    rms_norm(x.matrix(5, 40), weight.vector(), 0.0f, whole.matrix(5, 40));
    TensorView last = x.matrix(1, 40);
    last.data = last.as<float>() + 4 * 40;
    rms_norm(last, weight.vector(), 0.0f, row.matrix(1, 40));
    for (int i = 0; i < 40; ++i) CHECK(whole.bits(4 * 40 + i) == row.bits(i));
  }
}

TEST_CASE("rope: pairs turned by their angle, for all tiers and sizes") {
  for (const std::int64_t head_dim : {2, 16, 20, 48, 64, 80, 96, 128, 256}) {
    Random random(23);
    Floats table(DType::f32, 10 * head_dim);
    const std::int64_t half = head_dim / 2;
    for (std::int64_t p = 0; p < 10; ++p) {
      for (std::int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(p) / (1.0 + static_cast<double>(i));
        table.set(p * head_dim + i, static_cast<float>(std::cos(angle)));
        table.set(p * head_dim + half + i, static_cast<float>(std::sin(angle)));
      }
    }
    std::vector<std::int32_t> positions = {3, 0, 9, 9};
    std::vector<float> from, to;
    const TensorView x = apart(from, 4, 3, head_dim);
    each(x, [&](auto r, auto h, auto i) { at(x, r, h, i) = random.normal(); });
    for (const std::string& isa : cpu_isas()) {
      const IsaScope scope(isa);
      INFO(isa << ", " << head_dim);
      to = from;
      TensorView out = x;
      out.data = to.data();
      rope(out, table.matrix(10, head_dim), TensorView::vector(positions.data(), DType::s32, 4));
      double worst = 0.0;
      each(x, [&](std::int64_t r, std::int64_t h, std::int64_t i) {
        const std::int64_t pair = i % half, row = positions[r] * head_dim;
        const double cosine = table.get(row + pair), sine = table.get(row + half + pair);
        const double low = at(x, r, h, pair), high = at(x, r, h, pair + half);
        const double exact = i < half ? low * cosine - high * sine : high * cosine + low * sine;
        worst = std::max(worst, std::fabs(at(out, r, h, i) - exact) / (std::fabs(low) + std::fabs(high)));
      });
      CHECK(worst <= 2 * 0x1p-24);
      CHECK(touched_outside(to, out) == 0);
    }
  }
}

TEST_CASE("silu_mul: the exact product but for rounding, from tiny to huge gates") {
  for (const std::int64_t n : kSizes) {
    Random random(24);
    constexpr std::int64_t kRows = 3;
    std::vector<float> from(static_cast<std::size_t>(kRows * (2 * n + 9))),
        to(static_cast<std::size_t>(kRows * (n + 4)));
    for (float& x : from) x = random.normal() * std::exp(random.uniform(-12.0f, 5.0f));
    const TensorView in{from.data(), DType::f32, 2, {kRows, 2 * n}, {2 * n + 9, 1}, {}};
    const TensorView out{to.data(), DType::f32, 2, {kRows, n}, {n + 4, 1}, {}};
    for (const std::string& isa : cpu_isas()) {
      const IsaScope scope(isa);
      INFO(isa << ", " << n);
      to.assign(to.size(), -7.0f);
      silu_mul(in, out);
      double worst = 0.0;
      for (std::int64_t r = 0; r < kRows; ++r) {
        for (std::int64_t i = 0; i < n; ++i) {
          const double gate = from[r * (2 * n + 9) + i], up = from[r * (2 * n + 9) + n + i];
          const double exact = gate / (1.0 + std::exp(-gate)) * up;
          const double bound = 8 * 0x1p-24 * std::fabs(exact) + 0x1p-118 * std::fabs(up);
          worst = std::max(worst, std::fabs(to[r * (n + 4) + i] - exact) / std::max(bound, 1e-300));
        }
      }
      CHECK(worst <= 1.0);
      for (std::int64_t r = 0; r < kRows; ++r) CHECK(to[r * (n + 4) + n] == -7.0f);
    }
  }
}

TEST_CASE("silu_mul: zeros, infinities and NaN") {
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> in = {0.0f, -0.0f, inf, std::numeric_limits<float>::quiet_NaN(), -200.0f, 1.0f, 1.0f,
                           1.0f, 1.0f,  1.0f};
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    INFO(isa);
    std::vector<float> out(5);
    silu_mul(TensorView::matrix(in.data(), DType::f32, 1, 10), TensorView::matrix(out.data(), DType::f32, 1, 5));
    CHECK(out[0] == 0.0f);
    CHECK(out[1] == 0.0f);
    CHECK(out[2] == inf);
    CHECK(std::isnan(out[3]));
    CHECK(std::fabs(out[4]) < 1e-35f);
  }
}

TEST_CASE("operators of a decoder block: the same bits on any number of threads", "[threads]") {
  Random random(25);
  const Floats x = normal_floats(random, DType::f32, 300 * 512), weight = normal_floats(random, DType::f32, 512);
  const Floats one(DType::f32, 300 * 512), three(DType::f32, 300 * 512);
  const auto run = [&](const Floats& out) {
    rms_norm(x.matrix(300, 512), weight.vector(), 1e-5f, out.matrix(300, 512));
  };
  {
    const ThreadScope threads(1);
    run(one);
  }
  const ThreadScope threads(3);
  run(three);
  CHECK(first_difference(one, three) == -1);
}

TEST_CASE("rms_norm, rope and silu_mul refuse what does not fit") {
  std::vector<float> floats(1024, 1.0f);
  std::vector<std::int32_t> positions = {0, 1, 7, 2};
  const auto matrix = [&](std::int64_t rows, std::int64_t n) {
    return TensorView::matrix(floats.data(), DType::f32, rows, n);
  };
  const auto vector = [&](std::int64_t n) { return TensorView::vector(floats.data(), DType::f32, n); };
  const TensorView where = TensorView::vector(positions.data(), DType::s32, 4);
  const TensorView x{floats.data(), DType::f32, 3, {4, 2, 6}, {12, 6, 1}, {}};
  CHECK(input_error_of([&] { rms_norm(matrix(4, 8), vector(8), 0.0f, matrix(4, 9)); }) ==
        "rms_norm: out has shape [4, 9]; expected that of x, [4, 8].");
  CHECK(input_error_of([&] { rms_norm(matrix(4, 8), vector(9), 0.0f, matrix(4, 8)); }).find("weight has shape [9]") !=
        std::string::npos);
  CHECK(input_error_of([&] { rms_norm(matrix(4, 8), vector(8), -1.0f, matrix(4, 8)); }).find("eps is -1") !=
        std::string::npos);
  CHECK(input_error_of([&] { rms_norm(vector(8), vector(8), 0.0f, vector(8)); }).find("2 or 3 dimensions") !=
        std::string::npos);
  CHECK(input_error_of([&] { rope(x, matrix(7, 6), where); }) ==
        "rope: position 7 of row 2 is not in the table; it has 7 rows.");
  CHECK(input_error_of([&] { rope(x, matrix(8, 8), where); }).find("the table has 8 columns") != std::string::npos);
  CHECK(input_error_of([&] { rope(matrix(4, 6), matrix(8, 6), where); }).find("expected 3 dimensions") !=
        std::string::npos);
  TensorView odd = x;
  odd.shape[2] = 5;
  CHECK(input_error_of([&] { rope(odd, matrix(8, 5), where); }).find("head_dim is 5") != std::string::npos);
  CHECK(input_error_of([&] { silu_mul(matrix(4, 8), matrix(4, 5)); }).find("expected [rows, 2n]") != std::string::npos);
  TensorView half = matrix(4, 8);
  half.dtype = DType::f16;
  CHECK(input_error_of([&] { silu_mul(half, matrix(4, 4)); }).find("gate_up is float16") != std::string::npos);
  half = matrix(4, 8);
  half.strides[1] = 2;
  CHECK(input_error_of([&] { silu_mul(half, matrix(4, 4)); }).find("not contiguous (stride 2)") != std::string::npos);
}

}  // namespace qtale::test

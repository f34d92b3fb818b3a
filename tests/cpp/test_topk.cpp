// project_topk on every instruction set against a full sort of exact products: shapes, ties, k, dtypes, NaN, threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "catch.h"
#include "support.h"

namespace qtale::test {
namespace {

struct Found {
  Lines<float> values;
  Lines<std::int32_t> indices;
};

struct Case {
  std::int64_t rows, depth, entries;
};

Found find(const Floats& x, const TensorView& matrix, const Case& c, std::int64_t k) {
  const auto size = static_cast<std::size_t>(c.rows * k);
  Found out{Lines<float>(size), Lines<std::int32_t>(size)};
  project_topk(x.matrix(c.rows, c.depth), matrix, TensorView::matrix(out.values.data(), DType::f32, c.rows, k),
               TensorView::matrix(out.indices.data(), DType::s32, c.rows, k));
  return out;
}
Found find(const Floats& x, const Floats& matrix, const Case& c, std::int64_t k) {
  return find(x, matrix.matrix(c.entries, c.depth), c, k);
}

// Small integers: every order of summation is exact, and equal products abound.
Floats integers(Random& random, DType dtype, std::int64_t size, int reach) {
  Floats out(dtype, size);
  for (std::int64_t i = 0; i < size; ++i) out.set(i, static_cast<float>(random.integer(-reach, reach)));
  return out;
}

std::vector<double> products(const Floats& x, const Floats& matrix, const Case& c, std::int64_t row) {
  std::vector<double> out(static_cast<std::size_t>(c.entries));
  for (std::int64_t e = 0; e < c.entries; ++e)
    for (std::int64_t i = 0; i < c.depth; ++i)
      out[e] += double{x.get(row * c.depth + i)} * double{matrix.get(e * c.depth + i)};
  return out;
}

// Entries from the best product to the worst, of equal ones the smaller entry first.
std::vector<std::int32_t> ranking(const std::vector<double>& products) {
  std::vector<std::int32_t> order(products.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return products[a] > products[b]; });
  return order;
}

void expect_exact(const Floats& x, const Floats& matrix, const Case& c, const std::vector<std::int64_t>& ks) {
  std::vector<Found> found;
  for (const std::int64_t k : ks) found.push_back(find(x, matrix, c, k));
  std::int64_t wrong = 0;
  for (std::int64_t r = 0; r < c.rows; ++r) {
    const auto exact = products(x, matrix, c, r);
    const auto order = ranking(exact);
    for (std::size_t i = 0; i < ks.size(); ++i)
      for (std::int64_t j = 0; j < ks[i]; ++j) {
        wrong += found[i].indices[r * ks[i] + j] != order[j];
        wrong += double{found[i].values[r * ks[i] + j]} != exact[order[j]];
      }
  }
  CHECK(wrong == 0);
}

// Rows and depths around the tiles of every tier; entries around groups, tiles and chunks.
const Case kCases[] = {{1, 1, 1},      {1, 17, 5},     {2, 16, 97},   {3, 33, 12},   {5, 100, 31},
                       {7, 15, 200},   {9, 48, 96},    {12, 31, 103}, {13, 31, 103}, {16, 64, 6},
                       {17, 130, 193}, {31, 300, 25},  {32, 16, 96},  {33, 257, 97}, {49, 20, 385},
                       {65, 513, 11},  {100, 8, 1000}, {4, 0, 9},     {40, 0, 100}};

}  // namespace

TEST_CASE("project_topk: exact products in exact order, ties by index, for all tiers, dtypes and k") {
  Random random(81);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const Case& c : kCases) {
      for (const DType dtype : kFloatTypes) {
        const Floats x = integers(random, DType::f32, c.rows * c.depth, 3);
        const Floats matrix = integers(random, dtype, c.entries * c.depth, 3);
        INFO(isa << " " << name_of(dtype) << " x [" << c.rows << ", " << c.depth << "], " << c.entries << " entries");
        const std::int64_t most = c.entries;
        expect_exact(x, matrix, c,
                     {1, std::min<std::int64_t>(2, most), (most + 1) / 2, std::max<std::int64_t>(1, most - 1), most});
      }
    }
  }
}

TEST_CASE("project_topk: real products stay within the stated bound and in descending order") {
  Random random(82);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const Case& c : {Case{1, 576, 700}, Case{6, 77, 300}, Case{20, 576, 500}, Case{40, 1030, 130}}) {
      for (const DType dtype : kFloatTypes) {
        const Floats x = normal_floats(random, DType::f32, c.rows * c.depth);
        const Floats matrix = normal_floats(random, dtype, c.entries * c.depth, 0.1f);
        constexpr std::int64_t kK = 50;
        const Found found = find(x, matrix, c, kK);
        INFO(isa << " " << name_of(dtype) << " x [" << c.rows << ", " << c.depth << "], " << c.entries << " entries");
        std::int64_t wrong = 0;
        for (std::int64_t r = 0; r < c.rows; ++r) {
          const auto exact = products(x, matrix, c, r);
          const auto order = ranking(exact);
          double widest = 0.0;
          for (std::int64_t e = 0; e < c.entries; ++e) {
            double sum = 0.0;
            for (std::int64_t i = 0; i < c.depth; ++i)
              sum += std::fabs(double{x.get(r * c.depth + i)} * double{matrix.get(e * c.depth + i)});
            widest = std::max(widest, sum * static_cast<double>(c.depth + 8) * 0x1p-24);
          }
          for (std::int64_t j = 0; j < kK; ++j) {
            const std::int64_t at = r * kK + j;
            wrong += !(std::fabs(found.values[at] - exact[found.indices[at]]) <= widest);
            wrong += !(std::fabs(found.values[at] - exact[order[j]]) <= widest);
            wrong += j > 0 && found.values[at] > found.values[at - 1];
          }
        }
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("project_topk: all products equal, of either sign of zero") {
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const std::int64_t rows : {1, 40}) {
      Floats x(DType::f32, rows * 16), matrix(DType::f32, 300 * 16);
      for (std::int64_t i = 0; i < x.size(); ++i) x.set(i, 0.0f);
      for (std::int64_t i = 0; i < matrix.size(); ++i) matrix.set(i, i / 16 % 2 ? 1.0f : -1.0f);
      expect_exact(x, matrix, {rows, 16, 300}, {1, 7, 299, 300});
    }
  }
}

TEST_CASE("project_topk: infinite products have their place, the worst one too") {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const std::int64_t rows : {1, 40}) {
      Floats x(DType::f32, rows), matrix(DType::f16, 200);
      for (std::int64_t i = 0; i < rows; ++i) x.set(i, 2.0f);
      for (std::int64_t i = 0; i < 200; ++i) matrix.set(i, i % 3 == 0 ? -kInf : i % 3 == 1 ? kInf : 1.0f);
      expect_exact(x, matrix, {rows, 1, 200}, {1, 50, 100, 199, 200});
    }
  }
}

TEST_CASE("project_topk: sorted vocabularies, where every product beats or misses all before it") {
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const float slope : {1.0f, -1.0f}) {
      Floats x(DType::f32, 20), matrix(DType::f32, 3000);
      for (std::int64_t r = 0; r < 20; ++r) x.set(r, r % 2 ? 1.0f : 2.0f);
      for (std::int64_t e = 0; e < 3000; ++e) matrix.set(e, slope * static_cast<float>(e));
      expect_exact(x, matrix, {20, 1, 3000}, {1, 10, 100, 1999});
    }
  }
}

TEST_CASE("project_topk: the same bits for any number of threads", "[threads]") {
  Random random(83);
  const Case c{40, 300, 5000};
  const Floats x = normal_floats(random, DType::f32, c.rows * c.depth);
  const Floats matrix = normal_floats(random, DType::f16, c.entries * c.depth);
  for (const std::string& isa : cpu_isas()) {
    if (isa == "reference") continue;
    const IsaScope scope(isa);
    const Found one = [&] {
      const ThreadScope threads(1);
      return find(x, matrix, c, 33);
    }();
    for (const int count : {2, 3, 7}) {
      const ThreadScope threads(count);
      const Found found = find(x, matrix, c, 33);
      CHECK(std::equal(one.values.begin(), one.values.end(), found.values.begin()));
      CHECK(one.indices == found.indices);
    }
  }
}

TEST_CASE("project_topk: more rows than one block, and none") {
  Random random(84);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    const Case many{1100, 3, 40};
    expect_exact(integers(random, DType::f32, 3300, 2), integers(random, DType::f32, 120, 2), many, {1, 5});
    CHECK(find(Floats(DType::f32, 0), integers(random, DType::f32, 120, 2), {0, 3, 40}, 4).values.empty());
  }
}

TEST_CASE("project_topk: rows of x and of the matrix may be apart, and nothing between them is read into products") {
  Random random(85);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const std::int64_t rows : {3, 50}) {
      const Case c{rows, 40, 230};
      const Floats x = integers(random, DType::f32, rows * 40, 3), matrix = integers(random, DType::bf16, 230 * 40, 3);
      Floats wide_x(DType::f32, rows * 45), wide(DType::bf16, 230 * 43);
      for (std::int64_t i = 0; i < wide_x.size(); ++i) wide_x.set(i, NAN);
      for (std::int64_t i = 0; i < wide.size(); ++i) wide.set(i, NAN);
      for (std::int64_t i = 0; i < x.size(); ++i) wide_x.set(i / 40 * 45 + i % 40, x.get(i));
      for (std::int64_t i = 0; i < matrix.size(); ++i) wide.set(i / 40 * 43 + i % 40, matrix.get(i));
      const Found dense = find(x, matrix, c, 9);
      TensorView apart_x = wide_x.matrix(rows, 45), apart = wide.matrix(230, 43);
      apart_x.shape[1] = apart.shape[1] = 40;
      Found found = dense;
      std::fill(found.values.begin(), found.values.end(), NAN);
      project_topk(apart_x, apart, TensorView::matrix(found.values.data(), DType::f32, rows, 9),
                   TensorView::matrix(found.indices.data(), DType::s32, rows, 9));
      CHECK(dense.values == found.values);
      CHECK(dense.indices == found.indices);
    }
  }
}

TEST_CASE("project_topk: NaN is refused with the first row and entry, whichever thread meets it", "[threads]") {
  Random random(86);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const std::int64_t rows : {4, 30, 700}) {
      const Case c{rows, 20, 400};
      const Floats clean = normal_floats(random, DType::f32, rows * 20);
      Floats x = clean, matrix = normal_floats(random, DType::f32, 400 * 20);
      x.set(3 * 20 + 7, NAN);
      std::string message = input_error_of([&] { find(x, matrix, c, 5); });
      INFO(isa << " " << rows << ": " << message);
      CHECK(message.find("project_topk: row 3 of x times row 0 of the matrix is NaN") == 0);
      matrix.set(333 * 20, NAN);
      message = input_error_of([&] { find(clean, matrix, c, 5); });
      CHECK(message.find("project_topk: row 0 of x times row 333 of the matrix is NaN") == 0);
    }
  }
}

}  // namespace qtale::test

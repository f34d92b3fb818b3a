// jaccard on every instruction set against sets of the standard library.
#include <algorithm>
#include <limits>
#include <set>

#include "catch.h"
#include "support.h"

namespace qtale::test {
namespace {

using Indices = std::vector<std::int32_t>;

TensorView matrix(Indices& indices, std::int64_t rows, std::int64_t cols) {
  return TensorView::matrix(indices.data(), DType::s32, rows, cols);
}

std::vector<double> coefficients(Indices a, Indices b, std::int64_t rows) {
  std::vector<double> out(static_cast<std::size_t>(rows), -1.0);
  const auto cols = [&](const Indices& i) { return static_cast<std::int64_t>(i.size()) / rows; };
  jaccard(matrix(a, rows, cols(a)), matrix(b, rows, cols(b)), TensorView::vector(out.data(), DType::f64, rows));
  return out;
}

double expected(const std::int32_t* a, std::int64_t a_size, const std::int32_t* b, std::int64_t b_size) {
  const std::set<std::int32_t> left(a, a + a_size), right(b, b + b_size);
  std::set<std::int32_t> all = left;
  all.insert(right.begin(), right.end());
  const auto common =
      std::count_if(left.begin(), left.end(), [&](std::int32_t index) { return right.count(index) > 0; });
  return all.empty() ? 1.0 : static_cast<double>(common) / static_cast<double>(all.size());
}

}  // namespace

TEST_CASE("jaccard: known sets, duplicates, empty rows, extremes of int32") {
  constexpr auto kMin = std::numeric_limits<std::int32_t>::min(), kMax = std::numeric_limits<std::int32_t>::max();
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    INFO(isa);
    CHECK(coefficients({1, 2, 3}, {3, 2, 1}, 1) == std::vector<double>{1.0});
    CHECK(coefficients({1, 2, 3}, {4, 5, 6}, 1) == std::vector<double>{0.0});
    CHECK(coefficients({1, 2, 3}, {2, 3, 4}, 1) == std::vector<double>{0.5});
    CHECK(coefficients({1, 1, 1, 2}, {2, 2}, 1) == std::vector<double>{0.5});
    CHECK(coefficients({kMin, kMax, -1, 0}, {kMax, kMin}, 1) == std::vector<double>{0.5});
    CHECK(coefficients({}, {7, 8}, 1) == std::vector<double>{0.0});
    CHECK(coefficients({}, {}, 1) == std::vector<double>{1.0});
    CHECK(coefficients({1, 2, 1, 3}, {1, 2, 1, 2}, 2) == std::vector<double>({1.0, 1.0 / 3.0}));
  }
}

TEST_CASE("jaccard: random rows of every size, apart in memory, on any number of threads", "[threads]") {
  Random random(91);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const int threads : {1, 3}) {
      const ThreadScope thread_scope(threads);
      for (const std::int64_t size : {1, 2, 7, 64, 300}) {
        const std::int64_t rows = 37, other = size / 2 + 1;
        Indices a(static_cast<std::size_t>(rows * size)), b(static_cast<std::size_t>(rows * (other + 3)));
        for (std::int32_t& index : a) index = random.integer(-5, static_cast<int>(size));
        for (std::int32_t& index : b) index = random.integer(-5, static_cast<int>(size));
        std::vector<double> out(static_cast<std::size_t>(rows));
        TensorView apart = matrix(b, rows, other + 3);
        apart.shape[1] = other;
        jaccard(matrix(a, rows, size), apart, TensorView::vector(out.data(), DType::f64, rows));
        std::int64_t wrong = 0;
        for (std::int64_t r = 0; r < rows; ++r)
          wrong += out[r] != expected(&a[r * size], size, &b[r * (other + 3)], other);
        INFO(isa << " size " << size);
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("jaccard: no rows") {
  Indices none;
  std::vector<double> out;
  jaccard(matrix(none, 0, 5), matrix(none, 0, 3), TensorView::vector(out.data(), DType::f64, 0));
  CHECK(out.empty());
}

}  // namespace qtale::test

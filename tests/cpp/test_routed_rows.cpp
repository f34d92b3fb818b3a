// compact_rows and scatter_add_rows on every instruction set: what moves, what stays, what is refused.
#include <cmath>
#include <numeric>

#include "catch.h"
#include "qtale/decoder_ops.h"
#include "support.h"

namespace qtale::test {
namespace {

using Indices = Lines<std::int32_t>;

TensorView view(const Indices& indices) {
  return TensorView::vector(const_cast<std::int32_t*>(indices.data()), DType::s32,
                            static_cast<std::int64_t>(indices.size()));
}

// Each row with this probability, in ascending order or not.
Indices some_rows(Random& random, std::int64_t rows, float ratio, bool ascending) {
  Indices out;
  for (std::int64_t r = 0; r < rows; ++r)
    if (random.uniform(0.0f, 1.0f) < ratio) out.push_back(static_cast<std::int32_t>(r));
  if (!ascending)
    for (std::size_t i = out.size(); i > 1; --i)
      std::swap(out[i - 1], out[static_cast<std::size_t>(random.integer(0, static_cast<int>(i) - 1))]);
  return out;
}

// A matrix whose rows are some elements apart; what lies between them is NaN.
struct Rows {
  std::int64_t rows, size, stride;
  Floats floats;
  Rows(DType dtype, std::int64_t rows_, std::int64_t size_, std::int64_t gap)
      : rows(rows_), size(size_), stride(size_ + gap), floats(dtype, rows_ * stride) {
    for (std::int64_t i = 0; i < floats.size(); ++i) floats.set(i, NAN);
  }
  void fill(Random& random) {
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t i = 0; i < size; ++i) floats.set(r * stride + i, random.normal());
  }
  float get(std::int64_t r, std::int64_t i) const { return floats.get(r * stride + i); }
  TensorView matrix() const {
    TensorView out = floats.matrix(rows, stride);
    out.shape[1] = size;
    return out;
  }
  std::int64_t written_gaps() const {
    std::int64_t out = 0;
    for (std::int64_t i = 0; i < floats.size(); ++i) out += i % stride >= size && !std::isnan(floats.get(i));
    return out;
  }
};

}  // namespace

TEST_CASE("compact_rows: rows come out as they are, for all tiers, dtypes, ratios and gaps") {
  Random random(101);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const DType dtype : kFloatTypes) {
      for (const std::int64_t size : {0, 1, 7, 8, 16, 33, 576}) {
        for (const float ratio : {0.0f, 0.3f, 1.0f}) {
          Rows x(dtype, 90, size, 3);
          x.fill(random);
          const Indices indices = some_rows(random, x.rows, ratio, size != 33);
          Rows out(DType::f32, static_cast<std::int64_t>(indices.size()), size, 5);
          compact_rows(x.matrix(), view(indices), out.matrix());
          std::int64_t wrong = out.written_gaps();
          for (std::int64_t r = 0; r < out.rows; ++r)
            for (std::int64_t i = 0; i < size; ++i) wrong += out.get(r, i) != x.get(indices[r], i);
          INFO(isa << " " << name_of(dtype) << " " << out.rows << " of 90 rows of " << size);
          CHECK(wrong == 0);
        }
      }
    }
  }
}

TEST_CASE("compact_rows: a row may be taken twice") {
  Rows x(DType::f32, 4, 9, 0), out(DType::f32, 3, 9, 0);
  Random random(102);
  x.fill(random);
  compact_rows(x.matrix(), view(Indices{2, 0, 2}), out.matrix());
  for (std::int64_t i = 0; i < 9; ++i) CHECK((out.get(0, i) == x.get(2, i) && out.get(2, i) == x.get(2, i)));
}

TEST_CASE("scatter_add_rows: adds to the rows it names and leaves the others, for all tiers and threads", "[threads]") {
  Random random(103);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const std::int64_t size : {0, 1, 7, 8, 16, 33, 700}) {
      for (const int threads : {1, 3}) {
        for (const bool gated : {false, true}) {
          const ThreadScope thread_scope(threads);
          Rows x(DType::f32, 200, size, 4);
          x.fill(random);
          const Rows before = x;
          const Indices indices = some_rows(random, x.rows, 0.5f, size != 7);
          Rows delta(DType::f32, static_cast<std::int64_t>(indices.size()), size, 2);
          delta.fill(random);
          const Floats gates = normal_floats(random, DType::f32, delta.rows);
          const TensorView gate_view = gates.vector();
          scatter_add_rows(delta.matrix(), view(indices), gated ? &gate_view : nullptr, x.matrix());
          std::int64_t wrong = x.written_gaps();
          std::vector<std::int64_t> source(200, -1);
          for (std::size_t i = 0; i < indices.size(); ++i) source[indices[i]] = static_cast<std::int64_t>(i);
          for (std::int64_t r = 0; r < 200; ++r) {
            for (std::int64_t i = 0; i < size; ++i) {
              float expected = before.get(r, i);
              if (source[r] >= 0) {
                const float added = (gated ? gates.get(source[r]) : 1.0f) * delta.get(source[r], i);
                expected += added;
              }
              wrong += x.get(r, i) != expected;
            }
          }
          INFO(isa << " " << indices.size() << " rows of " << size << ", gates " << gated);
          CHECK(wrong == 0);
        }
      }
    }
  }
}

TEST_CASE("routed rows: wrong arguments are refused in a sentence, and nothing is written") {
  Rows x(DType::f32, 4, 3, 0), part(DType::f32, 2, 3, 0);
  Floats gate(DType::f32, 3), half(DType::f16, 6);
  const TensorView gates = gate.vector();
  const auto compact = [&](const Indices& indices, const TensorView& out) {
    return input_error_of([&] { compact_rows(x.matrix(), view(indices), out); });
  };
  const auto scatter = [&](const Indices& indices, const TensorView* gate_view) {
    return input_error_of([&] { scatter_add_rows(part.matrix(), view(indices), gate_view, x.matrix()); });
  };
  CHECK(compact({0, 4}, part.matrix()) == "compact_rows: index 4 at place 1 is not a row of x; expected 0 to 3.");
  CHECK(compact({-1, 0}, part.matrix()).find("compact_rows: index -1 at place 0") == 0);
  CHECK(compact({0}, part.matrix()).find("compact_rows: indices has shape [1]; expected [2]") == 0);
  CHECK(compact({0, 1}, half.matrix(2, 3)) == "compact_rows: out is float16; expected float32.");
  CHECK(compact({0}, gate.matrix(1, 2)).find("compact_rows: the rows of out have 2 elements, those of x 3") == 0);
  CHECK(scatter({3, 4}, nullptr).find("scatter_add_rows: index 4 at place 1") == 0);
  CHECK(scatter({1, 1}, nullptr) == "scatter_add_rows: index 1 stands twice, again at place 1; use each row once.");
  CHECK(scatter({0, 1}, &gates).find("scatter_add_rows: gates has shape [3]; expected [2]") == 0);
  Rows four(DType::f32, 4, 3, 0);
  const std::string twice =
      input_error_of([&] { scatter_add_rows(four.matrix(), view(Indices{3, 0, 2, 0}), nullptr, x.matrix()); });
  CHECK(twice.find("scatter_add_rows: index 0 stands twice, again at place 3") == 0);
  for (std::int64_t i = 0; i < x.floats.size(); ++i) CHECK(std::isnan(x.floats.get(i)));
}

}  // namespace qtale::test

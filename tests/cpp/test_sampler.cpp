// The sampler: Philox against published numbers and numpy's, every filter and draw against a plain sort of all tokens.
#include "qtale/sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "catch.h"
#include "engine/token_choice.h"
#include "qtale/error.h"
#include "support.h"

namespace qtale::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
using Row = std::vector<float>;
using Sources = std::vector<std::shared_ptr<TokenSource>>;

Sources sources_of(std::int64_t rows, std::uint64_t seed = 0) {
  Sources out;
  for (std::int64_t i = 0; i < rows; ++i) out.push_back(std::make_shared<TokenSource>(seed, i));
  return out;
}

std::vector<std::int32_t> sampled(Row logits, std::int64_t rows, const Sources& sources,
                                  const SamplingOptions& options) {
  const std::int64_t vocab = static_cast<std::int64_t>(logits.size()) / rows;
  return sample(TensorView::matrix(logits.data(), DType::f32, rows, vocab), sources, options);
}

Row random_row(Random& random, std::int64_t vocab, float sigma) {
  Row row(static_cast<std::size_t>(vocab));
  for (float& value : row) value = sigma * random.normal();
  return row;
}

void remove_below(Row& values, float least) {
  for (float& value : values)
    if (value < least) value = -kInf;
}

void keep_top_p(Row& values, double share) {
  std::vector<std::size_t> order(values.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return values[a] != values[b] ? values[a] > values[b] : a > b; });
  double total = 0.0, sum = 0.0;
  for (const float value : values) total += static_cast<double>(std::exp(value));
  for (const std::size_t token : order) {
    const double weight = static_cast<double>(std::exp(values[token]));
    if (sum >= share * total) values[token] = -kInf;
    sum += weight;
  }
}

// What is left of each token's probability, times any number.
std::vector<double> weights_of(Row values, const SamplingOptions& options) {
  const float top = *std::max_element(values.begin(), values.end());
  const auto temperature = static_cast<float>(std::min(options.temperature, 3e38));
  for (float& value : values) value = (value - top) / temperature;
  if (options.top_k > 0 && options.top_k < std::ssize(values)) {
    Row sorted = values;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    remove_below(values, sorted[static_cast<std::size_t>(options.top_k) - 1]);
  }
  if (options.top_p < 1.0) keep_top_p(values, options.top_p);
  std::vector<double> out;
  for (const float value : values) {
    const float weight = std::exp(value);
    out.push_back(weight < static_cast<float>(options.min_p) ? 0.0 : static_cast<double>(weight));
  }
  return out;
}

// Whether cumulative sums give the token for the number; rounding may move them by 1e-5 of all.
bool is_drawn(const std::vector<double>& weights, double uniform, std::int32_t token) {
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0), wanted = uniform * total;
  const double before = std::accumulate(weights.begin(), weights.begin() + token, 0.0);
  const double weight = weights[static_cast<std::size_t>(token)], slack = 1e-5 * total;
  return weight > 0.0 && before <= wanted + slack && wanted < before + weight + slack;
}

void expect_draws(const Row& row, const SamplingOptions& options) {
  const std::vector<double> weights = weights_of(row, options);
  INFO(row.size() << " tokens, temperature " << options.temperature << ", top_k " << options.top_k << ", top_p "
                  << options.top_p << ", min_p " << options.min_p);
  engine::TokenChoice choice;
  int wrong = 0;
  for (const double uniform : {0.0, 1e-9, 0.1, 0.25, 0.5, 0.77, 0.9, 0.999, 1.0 - 0x1p-53})
    wrong += !is_drawn(weights, uniform, choice.choose(row, options, uniform));
  CHECK(wrong == 0);
}

const SamplingOptions kFilters[] = {
    {0.7, 0, 1.0, 0.0, 1.0},  {1.0, 1, 1.0, 0.0, 1.0},    {1.5, 3, 1.0, 0.0, 1.0},     {1.0, 40, 1.0, 0.0, 1.0},
    {1.0, 0, 0.8, 0.0, 1.0},  {3.0, 0, 0.9997, 0.0, 1.0}, {1.0, 0, 1e-6, 0.0, 1.0},    {1.0, 0, 1.0, 0.05, 1.0},
    {1.0, 0, 1.0, 1.0, 1.0},  {1.0, 0, 1.0, 1e-30, 1.0},  {0.8, 200, 0.95, 0.02, 1.0}, {9.0, 1500, 0.6, 0.0, 1.0},
    {1e30, 7, 0.5, 0.0, 1.0}, {1e-3, 50, 0.9, 0.1, 1.0},  {1e-42, 0, 0.9, 0.0, 1.0},   {1e300, 5, 0.3, 0.5, 1.0}};

}  // namespace

TEST_CASE("sampler: Philox4x64-10 gives the numbers that its authors published") {
  constexpr std::uint64_t kOnes = ~std::uint64_t{0};
  CHECK(Philox::block({0, 0, 0, 0}, {0, 0}) ==
        Philox::Block{0x16554d9eca36314c, 0xdb20fe9d672d0fdc, 0xd7e772cee186176b, 0x7e68b68aec7ba23b});
  CHECK(Philox::block({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}) ==
        Philox::Block{0x87b092c3013fe90b, 0x438c3c67be8d0224, 0x9cc7d7c69cd777b6, 0xa09caebf594f0ba0});
  CHECK(Philox::block({0x243f6a8885a308d3, 0x13198a2e03707344, 0xa4093822299f31d0, 0x082efa98ec4e6c89},
                      {0x452821e638d01377, 0xbe5466cf34e90c6c}) ==
        Philox::Block{0xa528f45403e61d95, 0x38c72dbd566e9788, 0xa5a1610e72fd18b5, 0x57bd43b5e52b7fe6});
}

TEST_CASE("sampler: uniform numbers are those of numpy") {
  Philox random(7, 3);
  for (const double expected : {0x1.edb31ec618b30p-2, 0x1.72c1e5d4967f1p-1, 0x1.9bae5c02bbd60p-5, 0x1.43b6c348a9a9ap-2,
                                0x1.5c8b1237ef569p-1, 0x1.9002d572e3804p-3})
    CHECK(random.uniform() == expected);
}

TEST_CASE("sampler: greedy takes the first of the largest and draws nothing") {
  Random random(1);
  for (const std::int64_t vocab : {1, 2, 7, 31, 32, 33, 2049, 50000}) {
    Row row = random_row(random, vocab, 3.0F);
    for (const std::int64_t place : {vocab / 3, vocab / 2, vocab - 1}) row[static_cast<std::size_t>(place)] = 100.0F;
    const Sources sources = sources_of(1, 5);
    for (const double temperature : {0.0, 1e-60})
      CHECK(sampled(row, 1, sources, {temperature, 3, 0.5, 0.1, 1.0})[0] == vocab / 3);
    CHECK(sources[0]->uniform() == Philox(5, 0).uniform());
  }
  CHECK(sampled({-1.0F, -0.0F, 0.0F, -kInf}, 1, sources_of(1), {})[0] == 1);
}

TEST_CASE("sampler: filters keep what a sort of all tokens keeps, draws follow cumulative sums") {
  Random random(2);
  for (const std::int64_t vocab : {1, 2, 7, 33, 1024, 2049, 50000}) {
    const Row row = random_row(random, vocab, 3.0F);
    Row coarse = row, peaked = row, masked(row.size(), -kInf);
    for (float& value : coarse) value = std::round(value);
    for (int i = 0; i < 20; ++i) peaked[static_cast<std::size_t>(random.integer(0, static_cast<int>(vocab) - 1))] += 20;
    masked[static_cast<std::size_t>(vocab / 2)] = -3.0F;
    for (const SamplingOptions& options : kFilters)
      for (const Row& each : {row, coarse, peaked, masked, Row(row.size(), 2.5F)}) expect_draws(each, options);
  }
}

TEST_CASE("sampler: filters on every instruction set") {
  Random random(3);
  const Row row = random_row(random, 5000, 2.0F);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    INFO(isa);
    for (const SamplingOptions& options : kFilters) expect_draws(row, options);
  }
}

TEST_CASE("sampler: top_p takes the larger of equals first") {
  engine::TokenChoice choice;
  const Row row = {1.0F, 2.0F, 1.0F, 1.0F, 2.0F};
  const SamplingOptions options{1.0, 0, 0.85, 0.0, 1.0};
  // e^0 twice and e^-1 three times, 3.1 in all: the share needs two of the three.
  for (const double uniform : {0.0, 0.2, 0.4, 0.6, 0.8, 0.95}) CHECK(choice.choose(row, options, uniform) != 0);
  CHECK(choice.choose(row, {1.0, 0, 0.3, 0.0, 1.0}, 0.0) == 4);
}

TEST_CASE("sampler: the penalty is taken once from tokens that were seen") {
  const Sources sources = sources_of(1);
  const std::int64_t seen[] = {3, 1, 3, 1};
  sources[0]->see(seen);
  CHECK(std::vector<std::int32_t>(sources[0]->seen().begin(), sources[0]->seen().end()) ==
        std::vector<std::int32_t>{3, 1});
  Row row = {-0.5F, -1.0F, 0.25F, 4.0F};
  sample(TensorView::matrix(row.data(), DType::f32, 1, 4), sources, {0.0, 0, 1.0, 0.0, 2.0});
  CHECK(row == Row{-0.5F, -2.0F, 0.25F, 2.0F});
  sampled({1.0F, 2.0F}, 1, sources, {});
  CHECK(input_error_of([&] { sampled({1.0F, 2.0F}, 1, sources, {0.0, 0, 1.0, 0.0, 2.0}); }) ==
        "sample: token 3 was seen, but logits are of 2 tokens.");
  const std::int64_t negative[] = {-1};
  CHECK(input_error_of([&] { sources[0]->see(negative); }) == "TokenSource: -1 is no token; use 0 and more.");
}

TEST_CASE("sampler: logits that are no numbers are refused wherever they are", "[threads]") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const std::size_t vocab : {1, 31, 32, 40, 5000})
    for (const std::size_t place : {std::size_t{0}, vocab / 2, vocab - 1})
      for (const float wrong : {nan, -nan, kInf})
        for (const double temperature : {0.0, 1.0}) {
          Row row(2 * vocab, 1.0F);
          row[vocab + place] = wrong;
          CHECK_THROWS_AS(sampled(row, 2, sources_of(2), {temperature, 0, 1.0, 0.0, 1.0}), Error);
        }
  CHECK_THROWS_AS(sampled(Row(40, -kInf), 1, sources_of(1), {}), Error);
}

TEST_CASE("sampler: rows do not depend on each other or on threads", "[threads]") {
  Random random(4);
  constexpr std::int64_t kRows = 9, kVocab = 40000;
  const Row logits = random_row(random, kRows * kVocab, 2.0F);
  for (const SamplingOptions& options : kFilters) {
    std::vector<std::int32_t> alone;
    for (std::int64_t r = 0; r < kRows; ++r)
      alone.push_back(sampled(Row(logits.begin() + r * kVocab, logits.begin() + (r + 1) * kVocab), 1,
                              {std::make_shared<TokenSource>(6, r)}, options)[0]);
    for (const int count : {1, 2, 3}) {
      const ThreadScope threads(count);
      CHECK(sampled(logits, kRows, sources_of(kRows, 6), options) == alone);
    }
  }
}

TEST_CASE("sampler: wrong arguments are named") {
  Row row(6, 1.0F);
  const TensorView logits = TensorView::matrix(row.data(), DType::f32, 2, 3);
  const auto error = [&](const SamplingOptions& options) {
    return input_error_of([&] { sample(logits, sources_of(2), options); });
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(error({-1.0, 0, 1.0, 0.0, 1.0}) == "sample: temperature -1 is not accepted; it must be 0 (greedy) or more.");
  CHECK(error({nan, 0, 1.0, 0.0, 1.0}).find("sample: temperature") == 0);
  CHECK(error({1.0, -1, 1.0, 0.0, 1.0}) == "sample: top_k -1 is not accepted; it must be 0 (off) or more.");
  CHECK(error({1.0, 0, 0.0, 0.0, 1.0}) == "sample: top_p 0 is not accepted; it must be above 0 and at most 1.");
  CHECK(error({1.0, 0, 1.0, 1.5, 1.0}) == "sample: min_p 1.5 is not accepted; it must be from 0 to 1.");
  CHECK(error({1.0, 0, 1.0, 0.0, 0.0}) ==
        "sample: repetition_penalty 0 is not accepted; it must be from 1e-30 to 1e30.");
  const auto shape_error = [&](const TensorView& t) { return input_error_of([&] { sample(t, sources_of(2), {}); }); };
  CHECK(shape_error(TensorView::matrix(row.data(), DType::f16, 2, 3)) ==
        "sample: logits is float16; expected float32.");
  CHECK(shape_error(TensorView::vector(row.data(), DType::f32, 6)) ==
        "sample: logits has shape [6]; expected a matrix.");
  CHECK(shape_error(TensorView::matrix(row.data(), DType::f32, 3, 2)) == "sample: logits has 3 rows for 2 sources.");
  CHECK(shape_error(TensorView::matrix(row.data(), DType::f32, 2, 0)).find("sample: logits has shape [2, 0]") == 0);
  TensorView apart = logits;
  apart.shape[1] = 2;
  CHECK(shape_error(apart) == "sample: logits is not contiguous; call .contiguous() first.");
  CHECK(input_error_of([&] { sample(logits, Sources(2), {}); }) ==
        "sample: a source is missing; give one for each row.");
  CHECK(sample(TensorView::matrix(row.data(), DType::f32, 0, 3), {}, {}).empty());
}

}  // namespace qtale::test

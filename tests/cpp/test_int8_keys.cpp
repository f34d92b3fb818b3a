// Caches with keys of 8 bits: the same pages everywhere, attention against float64 over the keys as rounded, what a row
// may not depend on, how little outliers cost, refusals.
#include <cmath>
#include <limits>

#include "attention_oracle.h"
#include "catch.h"

namespace qtale::test {
namespace {

const Case kCases[] = {
    {1, 1, 16, 1, 1, 0},     {4, 2, 32, 5, 5, 0},     {9, 3, 64, 7, 40, 0},     {9, 3, 64, 70, 70, 0},
    {8, 1, 64, 33, 100, 0},  {3, 3, 16, 65, 129, 0},  {7, 1, 128, 1, 700, 0},   {8, 2, 64, 1, 1100, 0},
    {2, 2, 256, 9, 66, 0},   {14, 2, 64, 40, 550, 0}, {4, 2, 64, 50, 300, 37},  {6, 2, 32, 20, 1500, 600},
    {5, 5, 32, 3, 1030, 16}, {32, 4, 64, 26, 600, 0}, {8, 1, 64, 150, 700, 90},
};

// The instruction sets that have such caches.
std::vector<std::string> isas() {
  std::vector<std::string> found;
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    if (has_int8_keys(64)) found.push_back(isa);
  }
  return found;
}

Attending causal(Random& random, const Case& c, const Cache& cache) {
  Attending a{c.heads, c.head_dim, 1.0f / std::sqrt(static_cast<float>(c.head_dim)), {}, {}, {}, {}, {}};
  add_causal(a, random, cache, c.rows, c.window);
  return a;
}

}  // namespace

TEST_CASE("int8 keys: attention within its bound, near that of the reference, for all shapes") {
  const IsaScope reference("reference");
  for (const Case& c : kCases) {
    Random random(21);
    Cache cache(c.entries, c.kv_heads, c.head_dim, DType::s8);
    cache.fill(random);
    Attending a = causal(random, c, cache);
    const std::vector<float> expected = a.run();
    for (const std::string& isa : isas()) {
      const IsaScope scope(isa);
      for (const Compute compute : {Compute::floating, Compute::int8}) {
        a.compute = compute;
        INFO(text(c, DType::s8, compute, isa));
        const auto out = a.run();
        CHECK(worst_share(a, out) <= 1.0);
        // Codes are equal; what is left is the rounding of weights and values.
        float largest = 0.0f, off = 0.0f;
        for (const float x : cache.v) largest = std::max(largest, std::fabs(x));
        for (std::size_t i = 0; i < out.size(); ++i) off = std::max(off, std::fabs(out[i] - expected[i]));
        CHECK(off <= 0x1p-8f * 1.25f * largest);
      }
    }
  }
}

TEST_CASE("int8 keys: pages have the same bits on every instruction set, one by one or together") {
  const IsaScope reference("reference");
  for (const std::int64_t dim : {16, 32, 64, 128, 256}) {
    Random random(22);
    Cache together(50, 3, dim, DType::s8);
    std::vector<float> keys(together.k.size()), values(keys.size());
    for (float& x : keys) x = 100.0f * random.normal();
    for (float& x : values) x = random.normal();
    std::fill(keys.begin(), keys.begin() + dim, 0.0f);
    together.append(keys, values, 0);
    for (const std::string& isa : isas()) {
      const IsaScope scope(isa);
      INFO(isa << ", heads of " << dim);
      Cache apart(50, 3, dim, DType::s8);
      std::int64_t first = 0;
      for (const std::int64_t count : {1, 14, 1, 0, 20, 14}) {
        const auto from = first * 3 * dim, to = (first + count) * 3 * dim;
        apart.append({keys.begin() + from, keys.begin() + to}, {values.begin() + from, values.begin() + to}, first);
        first += count;
      }
      CHECK(together.memory == apart.memory);
    }
  }
}

TEST_CASE("int8 keys: rows of several blocks of queries have the bits they have alone") {
  const IsaScope reference("reference");
  Random random(27);
  const Case c{16, 1, 64, 90, 330, 0};
  Cache cache(c.entries, c.kv_heads, c.head_dim, DType::s8);
  cache.fill(random);
  for (const std::int64_t window : {0, 70}) {
    const Attending a = causal(random, {c.heads, c.kv_heads, c.head_dim, c.rows, c.entries, window}, cache);
    for (const std::string& isa : isas()) {
      const IsaScope scope(isa);
      INFO(isa << ", window " << window);
      CHECK(different_alone(a, a.run()) == 0);
    }
  }
}

TEST_CASE("int8 keys: a row has the same bits alone, in any run, in any batch and on any number of threads",
          "[threads]") {
  const IsaScope reference("reference");
  const std::pair<std::int64_t, std::int64_t> shapes[] = {{16, 6}, {32, 16}, {64, 6}, {64, 16}, {128, 6}, {256, 4}};
  for (const auto& [dim, heads] : shapes) {
    Random random(23);
    Cache first(1200, 2, dim, DType::s8), second(77, 2, dim, DType::s8);
    first.fill(random, 3.0f);
    second.fill(random);
    const Attending batch = ragged_batch(random, first, second, heads);
    for (const std::string& isa : isas()) {
      const IsaScope scope(isa);
      INFO(isa << ", " << heads << " heads of " << dim);
      CHECK(different_together(batch) == 0);
    }
  }
}

TEST_CASE("int8 keys: what a row does not see cannot reach it, what it sees makes it NaN") {
  constexpr std::int64_t kDim = 64, kRows = 70, kSize = 2 * kDim;
  const IsaScope reference("reference");
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN(), 3e38f}) {
    Random random(24);
    Cache cache(kRows, 1, kDim, DType::s8);
    cache.fill(random);
    for (const std::string& isa : isas()) {
      const IsaScope scope(isa);
      for (const std::int64_t entry : {66, 67}) {
        INFO(isa << ", entry " << entry << ", " << bad);
        Attending a{2, kDim, 0.125f, {}, {}, {}, {}, {}};
        add_causal(a, random, cache, kRows, 0);
        a.add(random, cache, 1, entry + 1, kRows, 0);  // sees what comes after it
        const auto before = a.run();
        Cache spoilt = cache;
        spoilt.pages.clear();
        for (auto& page : spoilt.memory) spoilt.pages.push_back(page.data());
        spoilt.append(std::vector<float>(kDim, bad), std::vector<float>(kDim, bad), entry);
        for (AttentionRun& run : a.runs) run.pages = spoilt.pages;
        const auto after = a.run();
        CHECK(differences(before.data(), after.data(), entry * kSize) == 0);
        CHECK(std::isnan(after[entry * kSize]));
        CHECK(differences(before.data() + kRows * kSize, after.data() + kRows * kSize, kSize) == 0);
      }
      Attending a{2, kDim, 0.125f, {}, {}, {}, {}, {}};
      a.add(random, cache, 1, 0, kRows, 0);
      a.q[3] = bad;
      const auto out = a.run();
      CHECK(std::isnan(out[0]) == !std::isfinite(bad));
      CHECK(std::isfinite(out[kDim]));
    }
  }
}

TEST_CASE("int8 keys: a few large dimensions, as models have them, cost little") {
  const IsaScope reference("reference");
  Random random(25);
  Cache cache(300, 1, 64, DType::s8), exact(300, 1, 64, DType::f32);
  std::vector<float> keys(cache.k.size()), values(keys.size());
  for (std::size_t i = 0; i < keys.size(); ++i) keys[i] = random.normal() + (i % 64 == 7 ? 40.0f : 0.0f);
  for (float& x : values) x = random.normal();
  cache.append(keys, values, 0);
  exact.append(keys, values, 0);
  double sum = 0.0, plain = 0.0;
  for (std::size_t i = 0; i < keys.size(); ++i) {
    sum += std::pow(cache.k[i] - keys[i], 2);
    const float largest = std::fabs(keys[i / 64 * 64 + 7]);
    plain += std::pow(std::nearbyint(keys[i] * 127.0f / largest) * largest / 127.0f - keys[i], 2);
  }
  INFO("rotated " << std::sqrt(sum / 19200) << ", as they are " << std::sqrt(plain / 19200));
  CHECK(sum < plain / 4);
  for (const std::string& isa : isas()) {
    const IsaScope scope(isa);
    Attending a{4, 64, 0.125f, {}, {}, {}, {}, {}};
    add_causal(a, random, cache, 50, 0);
    const auto out = a.run();
    for (AttentionRun& run : a.runs) run.pages = exact.pages;
    a.caches = {&exact};
    const auto expected = a.run();
    double error = 0.0, power = 0.0;
    for (std::size_t i = 0; i < out.size(); ++i) {
      error += std::pow(out[i] - expected[i], 2);
      power += std::pow(expected[i], 2);
    }
    INFO(isa << ": " << std::sqrt(error / power));
    CHECK(std::sqrt(error / power) < 0.03);
  }
}

TEST_CASE("int8 keys: refused where they are not") {
  const std::string sentence = "keys of 8 bits need a CPU with AVX-512 BF16";
  {
    const IsaScope scope("reference");
    CHECK(kv_page_bytes(3, 64, DType::s8) == 3 * (16 * 64 + 16 * 4 + 16 * 64 * 2));
    CHECK(input_error_of([] { kv_page_bytes(1, 80, DType::s8); }).find(sentence) != std::string::npos);
    CHECK(!has_int8_keys(8));
    CHECK(!has_int8_keys(512));
  }
  const IsaScope scope("generic");
  CHECK(!has_int8_keys(64));
  CHECK(input_error_of([] { kv_page_bytes(1, 64, DType::s8); }).find("kernels in use are generic") !=
        std::string::npos);
}

}  // namespace qtale::test

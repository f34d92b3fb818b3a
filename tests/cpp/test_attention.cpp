// Attention on every instruction set against float64: shapes, windows, ragged runs, both caches and modes; what a row
// may not depend on.
#include <cmath>

#include "attention_oracle.h"
#include "catch.h"

namespace qtale::test {
namespace {

const Case kCases[] = {
    {1, 1, 16, 1, 1, 0},     {4, 2, 20, 5, 5, 0},       {9, 3, 64, 7, 40, 0},    {9, 3, 64, 70, 70, 0},
    {8, 1, 64, 33, 100, 0},  {3, 3, 48, 65, 129, 0},    {2, 1, 80, 30, 47, 0},   {4, 4, 96, 13, 64, 0},
    {7, 1, 128, 1, 700, 0},  {8, 2, 64, 1, 1100, 0},    {2, 2, 256, 9, 66, 0},   {14, 2, 64, 40, 550, 0},
    {4, 2, 64, 50, 300, 37}, {6, 2, 24, 20, 1500, 600}, {5, 5, 32, 3, 1030, 16}, {32, 4, 64, 26, 600, 0},
    {2, 1, 2, 4, 20, 0},
};

}  // namespace

TEST_CASE("attention: the exact result within its bound, for all tiers, caches and shapes") {
  for (const DType dtype : {DType::f16, DType::f32}) {
    for (const Case& c : kCases) {
      Random random(11);
      Cache cache(c.entries, c.kv_heads, c.head_dim, dtype);
      cache.fill(random);
      Attending a{c.heads, c.head_dim, 1.0f / std::sqrt(static_cast<float>(c.head_dim)), {}, {}, {}, {}, {}};
      add_causal(a, random, cache, c.rows, c.window);
      for (const std::string& isa : cpu_isas()) {
        const IsaScope scope(isa);
        for (const Compute compute : kComputes) {
          a.compute = compute;
          INFO(text(c, dtype, compute, isa));
          CHECK(worst_share(a, a.run()) <= 1.0);
        }
      }
    }
  }
}

TEST_CASE("attention: scores that are large, equal or far apart") {
  Random random(12);
  Cache cache(200, 1, 64, DType::f32);
  for (const float sigma : {0.0f, 1e-3f, 4.0f}) {
    cache.fill(random, sigma);
    Attending a{3, 64, 1.0f, {}, {}, {}, {}, {}};
    add_causal(a, random, cache, 20, 0);
    for (const std::string& isa : cpu_isas()) {
      const IsaScope scope(isa);
      for (const Compute compute : kComputes) {
        a.compute = compute;
        INFO(isa << " " << name_of(compute) << ", sigma " << sigma);
        CHECK(worst_share(a, a.run()) <= 1.0);
      }
    }
  }
}

TEST_CASE("attention: a few dimensions of queries and keys that are far larger than the others") {
  Random random(31);
  for (const std::int64_t dim : {64, 72, 128}) {
    Cache cache(300, 1, dim, DType::f16);
    std::vector<float> keys(cache.k.size()), values(cache.v.size());
    for (std::size_t i = 0; i < keys.size(); ++i)
      keys[i] = random.normal() * (i % static_cast<std::size_t>(dim) == 5 ? 60.0f : 1.0f);
    for (std::size_t i = 0; i < values.size(); ++i)
      values[i] = random.normal() * (i % static_cast<std::size_t>(dim) == 9 ? 30.0f : 0.1f);
    cache.append(keys, values, 0);
    Attending a{4, dim, 0.05f, {}, {}, {}, {}, {}};
    add_causal(a, random, cache, 40, 0);
    for (std::size_t i = 7; i < a.q.size(); i += static_cast<std::size_t>(dim)) a.q[i] *= 40.0f;
    for (const std::string& isa : cpu_isas()) {
      const IsaScope scope(isa);
      for (const Compute compute : {Compute::floating, Compute::int8, Compute::bfloat16}) {
        a.compute = compute;
        INFO(isa << " " << name_of(compute) << ", heads of " << dim);
        CHECK(worst_share(a, a.run()) <= 1.0);
      }
    }
  }
}

TEST_CASE("attention: a row has the same bits alone, in any run, in any batch and on any number of threads",
          "[threads]") {
  const std::pair<DType, std::int64_t> kinds[] = {
      {DType::f16, 64}, {DType::f32, 64}, {DType::f16, 112}, {DType::f32, 112}, {DType::f16, 20}};
  for (const auto& [dtype, dim] : kinds) {
    Random random(13);
    Cache first(1200, 2, dim, dtype), second(77, 2, dim, dtype);
    first.fill(random);
    second.fill(random);
    Attending batch = ragged_batch(random, first, second, 6);
    for (const std::string& isa : cpu_isas()) {
      const IsaScope scope(isa);
      for (const Compute compute : kComputes) {
        batch.compute = compute;
        INFO(isa << " " << name_of(compute) << " " << name_of(dtype) << ", heads of " << dim);
        CHECK(different_together(batch) == 0);
      }
    }
  }
}

TEST_CASE("attention: scores that grow along the cache, so that what was summed is rescaled again and again") {
  Random random(19);
  Cache cache(1100, 1, 64, DType::f16);
  std::vector<float> keys(cache.k.size()), values(cache.v.size());
  for (std::size_t i = 0; i < keys.size(); ++i) keys[i] = random.normal() * static_cast<float>(i / 64) / 50.0f;
  for (float& x : values) x = random.normal();
  cache.append(keys, values, 0);
  Attending batch{8, 64, 1.0f, {}, {}, {}, {}, {}};
  add_causal(batch, random, cache, 20, 0);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const Compute compute : kComputes) {
      batch.compute = compute;
      INFO(isa << " " << name_of(compute));
      const auto out = batch.run();
      CHECK(worst_share(batch, out) <= 1.0);
      CHECK(different_alone(batch, out) == 0);
    }
  }
}

TEST_CASE("attention: int8 rounds with AVX-512 BF16 and with AVX2, elsewhere it is the float32 attention") {
  Random random(18);
  Cache cache(150, 2, 64, DType::f16);
  cache.fill(random);
  Attending a{4, 64, 0.125f, {}, {}, {}, {}, {}};
  add_causal(a, random, cache, 40, 0);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    INFO(isa);
    a.compute = Compute::floating;
    const auto exact = a.run();
    a.compute = Compute::int8;
    const bool same = differences(exact.data(), a.run().data(), static_cast<std::int64_t>(exact.size())) == 0;
    CHECK(same == (isa != "avx2" && (isa == "reference" || !has_bfloat16())));
  }
}

}  // namespace qtale::test

// Attention where entries are absent, infinite, far larger than others or far apart in memory; kv_append; refusals.
#include <cmath>
#include <cstring>
#include <limits>

#include "attention_oracle.h"
#include "catch.h"

namespace qtale::test {

TEST_CASE("attention: rows without entries are zero, rows of no run stay as they are") {
  Random random(14);
  Cache cache(20, 1, 16, DType::f16);
  cache.fill(random);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    INFO(isa);
    Attending a{2, 16, 0.25f, {}, {}, {}, {}, {}};
    a.add(random, cache, 2, 3, 3, 0);
    a.add(random, cache, 1, 0, 20, 0);
    a.add(random, cache, 3, -3, 0, 1);
    a.runs.erase(a.runs.begin() + 1);
    const auto out = a.run();
    for (int i = 0; i < 2 * 32; ++i) CHECK(out[i] == 0.0f);
    for (int i = 2 * 32; i < 3 * 32; ++i) CHECK(out[i] == -7.0f);
    for (int i = 3 * 32; i < 4 * 32; ++i) CHECK(out[i] == 0.0f);
    for (int d = 0; d < 16; ++d) CHECK(std::fabs(out[4 * 32 + d] - cache.value(0, 0, d)) < 1e-6f);
    a.runs.clear();
    CHECK(a.run()[0] == -7.0f);
  }
}

TEST_CASE("attention: what a row does not see cannot reach it, be it infinite") {
  constexpr std::int64_t kRows = 70;
  const std::pair<DType, std::int64_t> kinds[] = {
      {DType::f16, 64}, {DType::f32, 64}, {DType::f16, 80}, {DType::f16, 112}, {DType::f16, 128}};
  for (const auto& [dtype, dim] : kinds) {
    Random random(15);
    Cache cache(kRows, 1, dim, dtype);
    cache.fill(random);
    for (const std::string& isa : cpu_isas()) {
      const IsaScope scope(isa);
      for (const Compute compute : kComputes) {
        for (const std::int64_t entry : {5, 40, 66, 67}) {
          INFO(isa << " " << name_of(compute) << " " << name_of(dtype) << ", heads of " << dim << ", entry " << entry);
          Attending a{2, dim, 0.125f, {}, {}, {}, {}, {}};
          a.compute = compute;
          add_causal(a, random, cache, kRows, 0);
          a.add(random, cache, 1, entry + 1, kRows, 0);  // sees what comes after it
          const auto before = a.run();
          Cache spoilt = cache;
          spoilt.pages.clear();
          for (auto& page : spoilt.memory) spoilt.pages.push_back(page.data());
          const std::vector<float> bad(dim, std::numeric_limits<float>::infinity());
          spoilt.append(bad, bad, entry);
          for (AttentionRun& run : a.runs) run.pages = spoilt.pages;
          const auto after = a.run();
          CHECK(differences(before.data(), after.data(), entry * 2 * dim) == 0);
          CHECK(std::isnan(after[entry * 2 * dim]));
          CHECK(differences(before.data() + kRows * 2 * dim, after.data() + kRows * 2 * dim, 2 * dim) == 0);
        }
      }
    }
  }
}

TEST_CASE("attention: a large value that has no weight does not coarsen the others") {
  constexpr std::int64_t kDim = 64, kEntries = 100, kLarge = 10;
  Random random(25);
  Cache cache(kEntries, 1, kDim, DType::f16);
  cache.fill(random);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    INFO(isa);
    Attending a{1, kDim, 0.125f, {}, {}, {}, {}, {}};
    a.add(random, cache, 1, 0, kEntries, 0);
    a.add(random, cache, 1, 5, kEntries - 40, 0);
    std::copy_n(a.q.begin(), kDim, a.q.begin() + kDim);
    std::vector<float> key(kDim), value(kDim, 30000.0f);
    for (std::int64_t d = 0; d < kDim; ++d) key[d] = -12.0f * a.q[d];
    cache.append(key, value, kLarge);
    a.compute = Compute::floating;
    const auto exact = a.run();
    a.compute = Compute::int8;
    const auto rounded = a.run();
    float most = 0.0f, apart = 0.0f;
    for (std::size_t i = 0; i < exact.size(); ++i) {
      most = std::max(most, std::fabs(exact[i]));
      apart = std::max(apart, std::fabs(exact[i] - rounded[i]));
    }
    CHECK(apart < 0.03f * most);
  }
}

TEST_CASE("attention: weights that are all rounded away on AVX2 stay within the bound") {
  constexpr std::int64_t kDim = 64, kEntries = 64;
  // Queries and keys have one number each, which codes hold exactly.
  Cache cache(kEntries, 1, kDim, DType::f32);
  const float weight = 0.499f / 16383.0f;
  for (std::int64_t j = 0; j < kEntries; ++j) {
    std::vector<float> key(kDim), value(kDim, j == 0 ? -1.0f : 1.0f);
    key[0] = j == 0 ? 0.0f : std::log(weight);
    cache.append(key, value, j);
  }
  Random random(26);
  Attending a{1, kDim, 1.0f / 2047.0f, {}, {}, {}, {}, {}};
  a.add(random, cache, 1, 0, kEntries, 0);
  std::fill(a.q.begin(), a.q.end(), 0.0f);
  a.q[0] = 2047.0f;
  a.compute = Compute::int8;
  const double rest = (kEntries - 1) * double{weight}, exact = (rest - 1.0) / (rest + 1.0);
  for (const std::string& isa : cpu_isas()) {
    if (isa != "avx2") continue;
    const IsaScope scope(isa);
    for (const float x : a.run()) CHECK(std::fabs(x - exact) <= 0x1p-9 * 1.25);
  }
}

TEST_CASE("attention: rows of a block may be far apart, with memory between them that nothing was stored in") {
  constexpr std::int64_t kEntries = 200;
  const std::pair<DType, std::int64_t> kinds[] = {{DType::f16, 64}, {DType::f16, 20}, {DType::f32, 64},
                                                  {DType::f32, 20}, {DType::s8, 32},  {DType::s8, 64}};
  for (const auto& [dtype, dim] : kinds) {
    Random random(24);
    for (const std::string& isa : cpu_isas()) {
      const IsaScope scope(isa);
      if (dtype == DType::s8 && !has_int8_keys(dim)) continue;
      INFO(isa << " " << name_of(dtype) << ", heads of " << dim);
      Cache cache(kEntries, 1, dim, dtype);
      const auto append = [&](std::int64_t first, std::int64_t count) {
        std::vector<float> keys(static_cast<std::size_t>(count * dim)), values(keys.size());
        for (float& x : keys) x = random.normal();
        for (float& x : values) x = random.normal();
        cache.append(keys, values, first);
      };
      append(0, 40);
      append(160, 40);
      Attending a{3, dim, 0.125f, {}, {}, {}, {}, {}};
      a.compute = Compute::int8;
      a.add(random, cache, 8, 0, 33, 1);
      a.add(random, cache, 8, 160, 193, 1);
      a.runs[0].rows = 16;
      a.runs.pop_back();
      a.caches.pop_back();
      const auto out = a.run();
      CHECK(worst_share(a, out) <= 1.0);
      CHECK(different_alone(a, out) == 0);
    }
  }
}

TEST_CASE("kv_append: entries land in their places, one by one or together") {
  for (const DType dtype : {DType::f16, DType::f32}) {
    for (const std::string& isa : cpu_isas()) {
      const IsaScope scope(isa);
      INFO(isa << " " << name_of(dtype));
      Random random(16);
      Cache together(50, 3, 20, dtype), apart(50, 3, 20, dtype);
      together.fill(random, 100.0f);
      std::vector<float> keys, values;
      std::int64_t first = 0;
      for (const std::int64_t count : {1, 14, 1, 0, 20, 14}) {
        const auto from = first * 60, to = (first + count) * 60;
        apart.append({together.k.begin() + from, together.k.begin() + to},
                     {together.v.begin() + from, together.v.begin() + to}, first);
        first += count;
      }
      CHECK(together.memory == apart.memory);
      const Floats page(dtype, 3 * 2 * 16 * 20);
      std::memcpy(const_cast<void*>(page.data()), together.pages[1], together.memory[1].size());
      for (int d = 0; d < 20; ++d) {
        CHECK(page.get(2 * 640 + d * 16 + 5) == together.key(21, 2, d));
        CHECK(page.get(2 * 640 + 320 + 5 * 20 + d) == together.value(21, 2, d));
      }
    }
  }
}

TEST_CASE("attention and kv_append refuse what does not fit") {
  Random random(17);
  Cache cache(20, 2, 16, DType::f16);
  cache.fill(random);
  const auto refused = [&](const std::function<void(Attending&)>& spoil) {
    Attending a{4, 16, 0.25f, {}, {}, {}, {}, {}};
    a.add(random, cache, 3, 0, 18, 1);
    spoil(a);
    return input_error_of([&] { a.run(); });
  };
  CHECK(refused([](Attending&) {}).empty());
  CHECK(refused([](Attending& a) { a.end[1] = 33; }) ==
        "attention: entries 0 to 32 are not in the cache; its 2 pages hold 32.");
  CHECK(refused([](Attending& a) { a.begin[0] = -1; }).find("entries -1 to") != std::string::npos);
  CHECK(refused([](Attending& a) { a.runs[0].rows = 4; }).find("a run of 4 rows from row 0") != std::string::npos);
  CHECK(refused([](Attending& a) { a.runs.push_back(a.runs[0]); }).find("without overlap") != std::string::npos);
  CHECK(refused([](Attending& a) {
          a.heads = 3;
          a.q.resize(3 * 3 * 16);
        }).find("3 heads cannot share 2 KV heads") != std::string::npos);
  std::vector<void*> holes = {cache.pages[0], nullptr};
  CHECK(refused([&](Attending& a) { a.runs[0].pages = holes; }).find("page 1 of the cache") != std::string::npos);
  holes = {nullptr, cache.pages[1]};
  CHECK(refused([&](Attending& a) {
          a.runs[0].pages = holes;
          a.begin = {16, 16, 16};
        }).empty());
  CHECK(input_error_of([] { kv_page_bytes(2, 15, DType::f16); }).find("head_dim 15") != std::string::npos);
  CHECK(input_error_of([] { kv_page_bytes(0, 16, DType::f16); }).find("0 KV heads") != std::string::npos);
  CHECK(input_error_of([] { kv_page_bytes(2, 16, DType::bf16); }).find("bfloat16") != std::string::npos);
  CHECK(kv_page_bytes(3, 64, DType::f16) == 3 * 2 * 16 * 64 * 2);
  const std::vector<float> row(32);
  CHECK(input_error_of([&] { cache.append(row, row, 32); }).find("32 to 32 are not in the cache") != std::string::npos);
}

}  // namespace qtale::test

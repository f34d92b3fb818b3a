// Pages of caches: shared until written, given back, and never more than needed.
#include <cstring>
#include <numeric>

#include "catch.h"
#include "engine/kv_cache.h"
#include "support.h"

namespace qtale::test {
namespace {

using engine::LayerCache;
using engine::PagePool;

std::vector<std::int32_t> range(std::int32_t begin, std::int32_t end) {
  std::vector<std::int32_t> values(static_cast<std::size_t>(end - begin));
  std::iota(values.begin(), values.end(), begin);
  return values;
}

}  // namespace

TEST_CASE("a cache holds as many pages as its entries need", "[kv_cache]") {
  PagePool pool(1024, 2);
  LayerCache cache(pool, 1);
  for (std::int32_t length = 0; length < 100; ++length) {
    CHECK(cache.extend(range(length, length + 1)) == length);
    CHECK(cache.pages_held() == length / kPageTokens + 1);
    CHECK(pool.pages(1) == cache.pages_held());
  }
  CHECK(pool.pages(0) == 0);
  cache.truncate(33);
  CHECK(cache.entries() == 33);
  CHECK(pool.pages(1) == 3);
  cache.truncate(32);
  CHECK(pool.pages(1) == 2);
  cache.truncate(0);
  CHECK(pool.pages(1) == 0);
}

TEST_CASE("shared pages are copied before they change", "[kv_cache]") {
  PagePool pool(256, 1);
  LayerCache parent(pool, 0), child(pool, 0);
  parent.extend(range(0, 20));
  std::memset(parent.pages()[1], 7, 256);
  child.take_over(parent);
  CHECK(pool.pages(0) == 2);
  CHECK(child.extend(range(20, 22)) == 20);
  CHECK(pool.pages(0) == 3);
  CHECK(child.pages()[0] == parent.pages()[0]);
  CHECK(child.pages()[1] != parent.pages()[1]);
  CHECK(std::memcmp(child.pages()[1], parent.pages()[1], 256) == 0);
  // Full pages are never written again, so they stay shared.
  LayerCache full(pool, 0);
  parent.truncate(16);
  full.take_over(parent);
  full.extend(range(16, 17));
  CHECK(full.pages()[0] == parent.pages()[0]);
  CHECK(parent.entries() == 16);
}

TEST_CASE("pages are used again and positions may have gaps", "[kv_cache]") {
  PagePool pool(512 * 1024, 1);
  std::vector<void*> before;
  {
    LayerCache cache(pool, 0);
    cache.extend(range(0, 64));
    before.assign(cache.pages().begin(), cache.pages().end());
    CHECK(*static_cast<const char*>(before[0]) == 0);
    std::memset(before[0], 1, 100);
  }
  CHECK(pool.pages(0) == 0);
  LayerCache cache(pool, 0);
  const std::vector<std::int32_t> sparse = {3, 8, 9, 40};
  cache.extend(sparse);
  CHECK(*static_cast<const char*>(cache.pages()[0]) == 0);
  cache.truncate(10);
  CHECK(cache.entries() == 3);
  cache.truncate(9);
  CHECK(std::vector<std::int32_t>(cache.positions().begin(), cache.positions().end()) ==
        std::vector<std::int32_t>{3, 8});
}

}  // namespace qtale::test

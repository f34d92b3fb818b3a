// The sequences of a decoder and their caches.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "engine/kv_cache.h"

namespace qtale::engine {

struct Sequence {
  std::int64_t length = 0;
  std::vector<LayerCache> layers;
};

class Sequences {
 public:
  Sequences(std::int64_t page_bytes, std::size_t layers) : pool_(page_bytes, layers), layers_(layers) {}

  std::int64_t add();
  void remove(std::int64_t id);   // nothing happens where there is none
  Sequence& at(std::int64_t id);  // InputError where there is none
  const PagePool& pool() const { return pool_; }

  static void truncate(Sequence& sequence, std::int64_t length);

 private:
  PagePool pool_;  // outlives the caches below
  std::size_t layers_;
  std::map<std::int64_t, Sequence> sequences_;
  std::int64_t next_ = 0;
};

}  // namespace qtale::engine

// The KV caches of many sequences: pages that sequences with a common beginning share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "qtale/decoder_ops.h"

namespace qtale::engine {

// Pages of one size in slabs; a page counts the caches that hold it.
class PagePool {
 public:
  PagePool(std::int64_t page_bytes, std::size_t layers);
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  void* take(std::size_t layer);  // held once
  void share(void* page) const;
  void release(void* page);
  bool shared(const void* page) const { return holders(page) > 1; }
  std::int64_t holders(const void* page) const;
  void copy(void* to, const void* from) const;

  std::int64_t page_bytes() const { return page_bytes_; }
  std::int64_t pages(std::size_t layer) const { return used_[layer]; }

 private:
  struct Slab;
  struct Header;
  static Header& header(const void* page);
  void drop_slab(Slab* slab);

  const std::int64_t page_bytes_;
  std::vector<std::int64_t> used_;
  std::vector<std::unique_ptr<Slab>> slabs_;
  std::vector<Slab*> open_;  // slabs with a free page
};

// What one sequence holds in one layer: entries in ascending order of their positions.
class LayerCache {
 public:
  LayerCache(PagePool& pool, std::size_t layer) : pool_(&pool), layer_(layer) {}
  ~LayerCache() { truncate_entries(0); }
  LayerCache(LayerCache&& other) noexcept;
  LayerCache& operator=(LayerCache&&) = delete;

  std::int64_t entries() const { return static_cast<std::int64_t>(positions_.size()); }
  std::span<void* const> pages() const { return pages_; }
  // Pages held; those that others hold too count in parts.
  double pages_held() const;
  std::span<const std::int32_t> positions() const { return positions_; }

  // Makes room for entries at these positions, to be written by kv_append; returns the first entry's number.
  std::int64_t extend(std::span<const std::int32_t> positions);
  void truncate(std::int32_t position);  // forgets entries at this position and after it
  void take_over(LayerCache& other);

 private:
  void truncate_entries(std::size_t entries);

  PagePool* pool_;
  std::size_t layer_;
  std::vector<void*> pages_;
  std::vector<std::int32_t> positions_;
  std::size_t lent_ = 0;  // of the pages, the first ones that another cache may hold too
};

}  // namespace qtale::engine

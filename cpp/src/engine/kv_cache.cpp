#include "engine/kv_cache.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace qtale::engine {
namespace {

constexpr std::size_t kHeaderBytes = 64;  // keeps pages aligned
constexpr std::size_t kSlabBytes = 1 << 20;

}  // namespace

struct PagePool::Slab {
  std::byte* memory = nullptr;
  std::vector<void*> free;
  std::size_t pages = 0;
  ~Slab() { std::free(memory); }
};

struct PagePool::Header {
  Slab* slab;
  std::size_t layer;
  std::int64_t holders;
};

PagePool::PagePool(std::int64_t page_bytes, std::size_t layers) : page_bytes_(page_bytes), used_(layers) {}
PagePool::~PagePool() = default;

PagePool::Header& PagePool::header(const void* page) {
  return *reinterpret_cast<Header*>(static_cast<std::byte*>(const_cast<void*>(page)) - kHeaderBytes);
}

void* PagePool::take(std::size_t layer) {
  if (open_.empty()) {
    const std::size_t stride = kHeaderBytes + static_cast<std::size_t>(page_bytes_);
    auto slab = std::make_unique<Slab>();
    slab->pages = std::max<std::size_t>(1, kSlabBytes / stride);
    slab->memory = static_cast<std::byte*>(std::aligned_alloc(kHeaderBytes, slab->pages * stride));
    if (slab->memory == nullptr) throw std::bad_alloc();
    for (std::size_t i = slab->pages; i-- > 0;) {
      void* page = slab->memory + i * stride + kHeaderBytes;
      header(page).slab = slab.get();
      slab->free.push_back(page);
    }
    open_.push_back(slab.get());
    slabs_.push_back(std::move(slab));
  }
  Slab& slab = *open_.back();
  void* page = slab.free.back();
  slab.free.pop_back();
  if (slab.free.empty()) open_.pop_back();
  header(page).layer = layer;
  header(page).holders = 1;
  ++used_[layer];
  // Attention reads whole pages: what is beyond the last entry has to be finite.
  std::memset(page, 0, static_cast<std::size_t>(page_bytes_));
  return page;
}

void PagePool::share(void* page) const { ++header(page).holders; }

std::int64_t PagePool::holders(const void* page) const { return header(page).holders; }

void PagePool::copy(void* to, const void* from) const { std::memcpy(to, from, static_cast<std::size_t>(page_bytes_)); }

void PagePool::release(void* page) {
  Header& h = header(page);
  if (--h.holders > 0) return;
  --used_[h.layer];
  Slab* slab = h.slab;
  if (slab->free.empty()) open_.push_back(slab);
  slab->free.push_back(page);
  if (slab->free.size() == slab->pages && open_.size() > 1) drop_slab(slab);
}

void PagePool::drop_slab(Slab* slab) {
  std::erase(open_, slab);
  std::erase_if(slabs_, [&](const auto& owned) { return owned.get() == slab; });
}

LayerCache::LayerCache(LayerCache&& other) noexcept
    : pool_(other.pool_),
      layer_(other.layer_),
      pages_(std::exchange(other.pages_, {})),
      positions_(std::exchange(other.positions_, {})),
      lent_(std::exchange(other.lent_, 0)) {}

double LayerCache::pages_held() const {
  auto held = static_cast<double>(pages_.size() - lent_);
  for (std::size_t i = 0; i < lent_; ++i) held += 1.0 / static_cast<double>(pool_->holders(pages_[i]));
  return held;
}

std::int64_t LayerCache::extend(std::span<const std::int32_t> positions) {
  const std::int64_t first = entries();
  if (!positions.empty() && first % kPageTokens != 0 && pool_->shared(pages_.back())) {
    void* own = pool_->take(layer_);
    pool_->copy(own, pages_.back());
    pool_->release(pages_.back());
    pages_.back() = own;
  }
  positions_.insert(positions_.end(), positions.begin(), positions.end());
  while (static_cast<std::int64_t>(pages_.size()) * kPageTokens < entries()) pages_.push_back(pool_->take(layer_));
  return first;
}

void LayerCache::truncate(std::int32_t position) {
  const auto kept = std::lower_bound(positions_.begin(), positions_.end(), position);
  truncate_entries(static_cast<std::size_t>(kept - positions_.begin()));
}

void LayerCache::truncate_entries(std::size_t entries) {
  positions_.resize(entries);
  const std::size_t pages = (entries + kPageTokens - 1) / kPageTokens;
  for (; pages_.size() > pages; pages_.pop_back()) pool_->release(pages_.back());
  lent_ = std::min(lent_, pages);
}

void LayerCache::take_over(LayerCache& other) {
  truncate_entries(0);
  positions_ = other.positions_;
  pages_ = other.pages_;
  lent_ = other.lent_ = pages_.size();
  for (void* page : pages_) pool_->share(page);
}

}  // namespace qtale::engine

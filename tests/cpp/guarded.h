// Memory with a page behind it that faults, for kernels whose accesses no sanitizer sees.
#pragma once

#ifdef __linux__
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "catch.h"

namespace qtale::test {

// Memory that ends where nothing may be read or written.
class Guarded {
 public:
  explicit Guarded(std::int64_t bytes) : mapped_((bytes + 2 * kPage - 1) / kPage * kPage) {
    memory_ = static_cast<std::byte*>(
        mmap(nullptr, static_cast<std::size_t>(mapped_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    REQUIRE(memory_ != MAP_FAILED);
    REQUIRE(mprotect(memory_ + mapped_ - kPage, kPage, PROT_NONE) == 0);
    data_ = memory_ + mapped_ - kPage - bytes;
  }
  Guarded(const void* from, std::int64_t bytes) : Guarded(bytes) {
    if (bytes > 0) std::memcpy(data_, from, static_cast<std::size_t>(bytes));
  }
  ~Guarded() { munmap(memory_, static_cast<std::size_t>(mapped_)); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  std::byte* data() const { return data_; }

 private:
  static constexpr std::int64_t kPage = 4096;
  std::int64_t mapped_;
  std::byte *memory_, *data_;
};

}  // namespace qtale::test
#endif

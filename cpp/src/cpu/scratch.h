// Scratch memory of one thread that grows and is kept: qmatmul is called hundreds of times per token.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace qtale::cpu {

class Scratch {
 public:
  // At least `bytes` bytes, 64-byte aligned, contents undefined; valid until the next call.
  std::byte* reserve(std::size_t bytes) {
    if (bytes > size_) {
      const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<std::byte*>(std::aligned_alloc(64, rounded)));
      if (!memory_) throw std::bad_alloc();
      size_ = rounded;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::size_t size_ = 0;
};

}  // namespace qtale::cpu

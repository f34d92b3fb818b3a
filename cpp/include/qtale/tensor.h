// A view of memory that somebody else owns: the only currency between the core and its callers.
#pragma once

#include <array>
#include <cstdint>

#include "qtale/device.h"
#include "qtale/dtype.h"

namespace qtale {

inline constexpr int kMaxRank = 4;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int rank = 0;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> strides{};  // in elements
  Device device{};

  std::int64_t numel() const;
  bool is_contiguous() const;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

  // Row-major views of memory on the CPU.
  static TensorView vector(void* data, DType dtype, std::int64_t size);
  static TensorView matrix(void* data, DType dtype, std::int64_t rows, std::int64_t cols);
};

}  // namespace qtale

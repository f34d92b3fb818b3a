// Single elements of float arrays whose dtype is known at run time only. Internal linkage, for the reason of half.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/half.h"
#include "qtale/dtype.h"

namespace qtale {

[[maybe_unused]] static inline float load_scalar(const void* data, DType dtype, std::int64_t at) {
  if (dtype == DType::f16) return f16_to_float(static_cast<const std::uint16_t*>(data)[at]);
  if (dtype == DType::bf16) return bf16_to_float(static_cast<const std::uint16_t*>(data)[at]);
  return static_cast<const float*>(data)[at];
}

[[maybe_unused]] static inline float silu_scalar(float x) {
  const float e = std::exp(-std::fabs(x));
  return x * ((x < 0.0f ? e : 1.0f) / (1.0f + e));
}

[[maybe_unused]] static inline void store_scalar(void* data, DType dtype, std::int64_t at, float value) {
  if (dtype == DType::f16) {
    static_cast<std::uint16_t*>(data)[at] = float_to_f16(value);
  } else if (dtype == DType::bf16) {
    static_cast<std::uint16_t*>(data)[at] = float_to_bf16(value);
  } else {
    static_cast<float*>(data)[at] = value;
  }
}

}  // namespace qtale

// Elements of float matrices and code vectors, and how large ones are read and written, over the Vec of the including
// file's instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/scalar.h"
#include "qtale/dtype.h"

namespace qtale::cpu {
namespace {

inline std::int64_t min64(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Typed access to whole vectors and, through a zero-filled buffer, to the rest of a row.
struct F32 {
  using T = float;
  static VecF load(const T* p) { return load_f32(p); }
  template <bool Stream = false>
  static void store(T* p, VecF v) {
    store_f32<Stream>(p, v);
  }
};
struct F16 {
  using T = std::uint16_t;
  static VecF load(const T* p) { return load_f16(p); }
  template <bool Stream = false>
  static void store(T* p, VecF v) {
    store_f16<Stream>(p, v);
  }
};
struct Bf16 {
  using T = std::uint16_t;
  static VecF load(const T* p) { return load_bf16(p); }
  template <bool Stream = false>
  static void store(T* p, VecF v) {
    store_bf16<Stream>(p, v);
  }
};

template <class E>
inline VecF load_part(const typename E::T* p, std::int64_t count) {
  typename E::T buffer[kWidth] = {};
  if (count > 0) std::memcpy(buffer, p, static_cast<std::size_t>(count) * sizeof(typename E::T));
  return E::load(buffer);
}
template <class E>
inline void store_part(typename E::T* p, VecF v, std::int64_t count) {
  typename E::T buffer[kWidth];
  E::store(buffer, v);
  if (count > 0) std::memcpy(p, buffer, static_cast<std::size_t>(count) * sizeof(typename E::T));
}
inline VecF load_codes_part(const std::int8_t* p, std::int64_t count) {
  std::int8_t buffer[kWidth] = {};
  if (count > 0) std::memcpy(buffer, p, static_cast<std::size_t>(count));
  return load_s8(buffer);
}
inline void store_codes_part(std::int8_t* p, VecF v, std::int64_t count) {
  std::int8_t buffer[kWidth];
  store_s8(buffer, v);
  if (count > 0) std::memcpy(p, buffer, static_cast<std::size_t>(count));
}

// Calls fn with the element type of a float dtype.
template <class Fn>
inline auto with_type(DType dtype, Fn&& fn) {
  if (dtype == DType::f16) return fn(F16{});
  if (dtype == DType::bf16) return fn(Bf16{});
  return fn(F32{});
}

// Outputs of at least this many bytes at once leave no cache for anybody: they are written past the caches.
constexpr std::int64_t kStreamBytes = std::int64_t{1} << 20;

// Whether `rows` rows of `row_bytes` at p can be streamed; whole lines only.
inline bool can_stream(const void* p, std::int64_t row_bytes, std::int64_t rows) {
  return rows * row_bytes >= kStreamBytes && row_bytes % 64 == 0 && reinterpret_cast<std::uintptr_t>(p) % 64 == 0;
}

// Bytes ahead of the first pass over a weight that are asked for: hardware alone reads one stream too late.
constexpr std::int64_t kReadAhead = 8192;

inline void read_ahead(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + kReadAhead); }

// The second pass asks for every other line that the first one will need next: neither leaves memory idle.
inline void read_further_ahead(const void* p, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 128) __builtin_prefetch(static_cast<const char*>(p) + 2 * kReadAhead + i);
}

}  // namespace
}  // namespace qtale::cpu

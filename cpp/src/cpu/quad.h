// Four floats in GCC's and clang's own vectors: what turns rows into columns in every tier alike.
#pragma once

#include <cstdint>
#include <cstring>

namespace qtale::cpu {
namespace {

using Quad = float __attribute__((vector_size(16)));

inline Quad load_quad(const float* p) {
  Quad q;
  std::memcpy(&q, p, sizeof q);
  return q;
}
inline void store_quad(float* p, Quad q) { std::memcpy(p, &q, sizeof q); }

// out[i][j] = from[j * stride + i]
struct Quads {
  Quad row[4];
};
inline Quads load_transposed(const float* from, std::int64_t stride) {
  const Quad a = load_quad(from), b = load_quad(from + stride);
  const Quad c = load_quad(from + 2 * stride), d = load_quad(from + 3 * stride);
  const Quad ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Quad cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return {{__builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5), __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7),
           __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5),
           __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7)}};
}

}  // namespace
}  // namespace qtale::cpu

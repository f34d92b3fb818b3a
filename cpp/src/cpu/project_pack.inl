// x as project_topk reads it: rows as they are for few of them, panels of as many rows as lanes for more.
#pragma once

#include "cpu/elements.inl"
#include "cpu/kernels.h"
#include "cpu/topk.h"
#include "cpu/unroll.h"

namespace qtale::cpu::projection {
namespace {

constexpr std::int64_t kDepth = 256;           // of one block: its part of x stays in L1
constexpr std::int64_t kStride = kDepth + 16;  // floats from entry to entry: no two lines of a tile share a set
constexpr std::int64_t kStep = 16;             // depth of one round of the inner loop
constexpr std::int64_t kEntries = 96;          // of one tile: shared by all rows
constexpr int kFewRows = kWidth * 3 / 4;
constexpr int kFewTile = 4;            // rows
constexpr std::int64_t kAhead = 4096;  // bytes

inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b * b; }

// Depth in equal blocks of whole rounds; the same for every tile, as sums are rounded after each block.
inline std::int64_t block_depth(std::int64_t depth) {
  const std::int64_t blocks = (depth + kDepth - 1) / kDepth;
  return blocks == 0 ? kStep : round_up((depth + blocks - 1) / blocks, kStep);
}

template <int Vecs>
std::size_t packed_bytes(std::int64_t rows, std::int64_t depth) {
  const std::int64_t padded_rows = rows <= kFewRows ? rows : round_up(rows, Vecs * kWidth);
  return static_cast<std::size_t>(padded_rows * round_up(depth, kStep)) * sizeof(float);
}

// Rows [rows, padded depth] for few of them, else panels [padded depth, lanes]; zeros fill the padding.
template <int Vecs>
void pack(const ProjectArgs& a, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kPanel = Vecs * kWidth;
  const std::int64_t padded = round_up(a.depth, kStep);
  const auto* x = static_cast<const float*>(a.x.data);
  auto* out = reinterpret_cast<float*>(a.packed) + begin * padded;
  if (a.rows <= kFewRows) {
    for (std::int64_t r = begin; r < end; ++r)
      for (std::int64_t i = 0; i < padded; ++i) *out++ = i < a.depth ? x[r * a.x.stride + i] : 0.0f;
    return;
  }
  for (std::int64_t r = begin; r < end; r += kPanel)
    for (std::int64_t i = 0; i < padded; ++i)
      for (std::int64_t lane = 0; lane < kPanel; ++lane)
        *out++ = i < a.depth && r + lane < a.rows ? x[(r + lane) * a.x.stride + i] : 0.0f;
}

}  // namespace
}  // namespace qtale::cpu::projection

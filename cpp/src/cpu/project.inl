// x times a vocabulary over the Vec of the including file's instruction set. Many rows: the lanes are rows of x and
// entries are broadcast, so nothing of the matrix is transposed. Few rows: the lanes run along the depth, and the
// matrix is read where it lies, once.
#pragma once

#include "cpu/elements.inl"
#include "cpu/kernels.h"
#include "cpu/topk.h"
#include "cpu/unroll.h"

namespace qtale::cpu::projection {
namespace {

constexpr std::int64_t kDepth = 256;   // of one block: its part of x stays in L1
constexpr std::int64_t kStep = 16;     // depth of one round of the inner loop
constexpr std::int64_t kEntries = 96;  // of one tile: shared by all rows
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

// What one thread needs: a block of entries as float32, and the sums of one tile [panels][entries][lanes].
template <int Group, int Vecs>
struct Workspace {
  static_assert(kEntries % Group == 0);
  float* entries;
  float* sums;
  explicit Workspace(std::byte* scratch)
      : entries(reinterpret_cast<float*>(scratch)), sums(entries + kEntries * kDepth) {}
  static std::size_t bytes(std::int64_t rows) {
    const std::int64_t lanes = rows <= kFewRows ? 0 : round_up(rows, Vecs * kWidth);
    return static_cast<std::size_t>(kEntries * kDepth + kEntries * lanes) * sizeof(float);
  }
};

// Raw memory that a tile asks for while it multiplies: `rows` lines that are `stride` bytes apart, then further on.
struct ReadAhead {
  const char* at;
  std::int64_t stride;
  std::int64_t step;
};

// Adds Group entries [Group][kDepth] times one panel of x [depth][lanes] to sums [Group][lanes], or begins them.
template <int Group, int Vecs, int Used>
__attribute__((noipa)) void tile_products(const float* x, const float* entries, std::int64_t rounds, bool begins,
                                          ReadAhead ahead, float* sums) {
  constexpr int kPanel = Vecs * kWidth;
  VecF acc[Group][Used];
  unroll<Group>([&](auto e)
                    QTALE_INLINE_LAMBDA { unroll<Used>([&](auto p) QTALE_INLINE_LAMBDA { acc[e][p] = set1(0.0f); }); });
  const std::int64_t step = ahead.step - Group * ahead.stride;
#pragma GCC unroll 1
  for (std::int64_t r = 0; r < rounds; ++r) {
    unroll<kStep>([&](auto i) QTALE_INLINE_LAMBDA {
      VecF row[Used];
      unroll<Used>([&](auto p) QTALE_INLINE_LAMBDA { row[p] = load_f32(x + i * kPanel + p * kWidth); });
      unroll<Group>([&](auto e) QTALE_INLINE_LAMBDA {
        const VecF entry = set1(entries[e * kDepth + i]);
        unroll<Used>([&](auto p) QTALE_INLINE_LAMBDA { acc[e][p] = fmadd(entry, row[p], acc[e][p]); });
      });
      if constexpr (i < Group) {
        __builtin_prefetch(ahead.at, 0, 2);
        ahead.at += ahead.stride;
      }
    });
    x += kStep * kPanel;
    entries += kStep;
    ahead.at += step;
  }
  unroll<Group>([&](auto e) QTALE_INLINE_LAMBDA {
    unroll<Used>([&](auto p) QTALE_INLINE_LAMBDA {
      float* sum = sums + e * kPanel + p * kWidth;
      store_f32(sum, begins ? acc[e][p] : add(load_f32(sum), acc[e][p]));
    });
  });
}

// Entries [count, depth] as float32 [.., kDepth], zeros up to whole rounds.
template <class E>
inline void convert(const typename E::T* from, std::int64_t stride, std::int64_t count, std::int64_t depth, float* to) {
  for (std::int64_t e = 0; e < count; ++e, from += stride, to += kDepth) {
    std::int64_t i = 0;
    for (; i + kWidth <= depth; i += kWidth) store_f32(to + i, E::load(from + i));
    for (; i < round_up(depth, kStep); i += kWidth)
      store_f32(to + i, i < depth ? load_part<E>(from + i, depth - i) : set1(0.0f));
  }
}

// Offers finished sums [count][lanes] of one panel.
template <int Vecs>
inline void select(const float* sums, std::int64_t entry, std::int64_t count, std::int64_t first_row, std::int64_t rows,
                   Candidates& c) {
  const unsigned all = rows >= 32 ? ~0u : (1u << rows) - 1u;
  for (std::int64_t e = 0; e < count; ++e, sums += Vecs * kWidth) {
    for (int p = 0; p < Vecs; ++p) {
      const float* thresholds = c.thresholds + first_row + p * kWidth;
      unsigned above = not_le(load_f32(sums + p * kWidth), load_f32(thresholds)) & (all >> (p * kWidth));
      for (; above != 0; above &= above - 1) {
        const int lane = p * kWidth + __builtin_ctz(above);
        offer(c, first_row + lane, entry + e, sums[lane]);
      }
    }
  }
}

// One tile of entries times all rows.
template <class E, int Group, int Vecs>
void run_tile(const ProjectArgs& a, std::int64_t entry, std::int64_t count, const Workspace<Group, Vecs>& w,
              Candidates& c) {
  constexpr std::int64_t kPanel = Vecs * kWidth;
  const auto* matrix = static_cast<const typename E::T*>(a.matrix.data) + entry * a.matrix.stride;
  const std::int64_t block = block_depth(a.depth), padded = round_up(a.depth, kStep);
  const std::int64_t groups = (count + Group - 1) / Group;
  const std::int64_t size = sizeof(typename E::T), stride = a.matrix.stride * size;
  std::int64_t depth = 0;
  for (std::int64_t begin = 0; begin < a.depth || begin == 0; begin += block) {
    depth = min64(block, a.depth - begin);
    convert<E>(matrix + begin, a.matrix.stride, count, depth, w.entries);
    const bool last = begin + block >= a.depth;
    const char* next = reinterpret_cast<const char*>(last ? matrix + count * a.matrix.stride : matrix + begin + block);
    const float* x = reinterpret_cast<const float*>(a.packed) + begin * kPanel;
    float* sums = w.sums;
    for (std::int64_t row = 0; row < a.rows; row += kPanel, x += padded * kPanel, sums += kEntries * kPanel) {
      const std::int64_t rows = min64(kPanel, a.rows - row);
      const auto tile = rows > kWidth ? tile_products<Group, Vecs, Vecs> : tile_products<Group, Vecs, 1>;
      for (std::int64_t g = 0; g < groups; ++g) {
        const ReadAhead ahead = row == 0 ? ReadAhead{next + g * Group * stride, stride, kStep * size}
                                         : ReadAhead{reinterpret_cast<const char*>(w.entries), 0, 0};
        tile(x, w.entries + g * Group * kDepth, round_up(depth, kStep) / kStep, begin == 0, ahead,
             sums + g * Group * kPanel);
      }
      if (last) select<Vecs>(sums, entry, count, row, rows, c);
    }
  }
}

// Rows of x times Entries rows of the matrix where they lie.
template <class E, int Rows, int Entries>
__attribute__((noipa)) void tile_few(const float* x, std::int64_t padded, const typename E::T* matrix,
                                     std::int64_t stride, std::int64_t depth, float* sums) {
  VecF acc[Rows][Entries];
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    unroll<Entries>([&](auto e) QTALE_INLINE_LAMBDA { acc[r][e] = set1(0.0f); });
  });
  const auto step = [&](auto&& load) QTALE_INLINE_LAMBDA {
    VecF entry[Entries];
    unroll<Entries>([&](auto e) QTALE_INLINE_LAMBDA { entry[e] = load(e); });
    unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
      const VecF row = load_f32(x + r * padded);
      unroll<Entries>([&](auto e) QTALE_INLINE_LAMBDA { acc[r][e] = fmadd(row, entry[e], acc[r][e]); });
    });
  };
  const typename E::T* const end = matrix + depth / kWidth * kWidth;
#pragma GCC unroll 1
  for (; matrix != end; matrix += kWidth, x += kWidth) {
    unroll<Entries>([&](auto e) QTALE_INLINE_LAMBDA {
      __builtin_prefetch(reinterpret_cast<const char*>(matrix + e * stride) + kAhead);
    });
    step([&](auto e) QTALE_INLINE_LAMBDA { return E::load(matrix + e * stride); });
  }
  if (depth % kWidth != 0)
    step([&](auto e) QTALE_INLINE_LAMBDA { return load_part<E>(matrix + e * stride, depth % kWidth); });
  unroll<Rows>([&](auto r) QTALE_INLINE_LAMBDA {
    unroll<Entries>([&](auto e) QTALE_INLINE_LAMBDA { sums[r * Entries + e] = reduce_add(acc[r][e]); });
  });
}

// Entries [entry, entry + Entries) times all of few rows.
template <class E, int Entries>
inline void few_rows(const ProjectArgs& a, std::int64_t entry, Candidates& c) {
  static constexpr decltype(&tile_few<E, 1, Entries>) kTiles[kFewTile] = {
      tile_few<E, 1, Entries>, tile_few<E, 2, Entries>, tile_few<E, 3, Entries>, tile_few<E, 4, Entries>};
  const auto* matrix = static_cast<const typename E::T*>(a.matrix.data) + entry * a.matrix.stride;
  const auto* x = reinterpret_cast<const float*>(a.packed);
  const std::int64_t padded = round_up(a.depth, kStep);
  float sums[kFewTile * Entries];
  for (std::int64_t row = 0; row < a.rows; row += kFewTile) {
    const std::int64_t rows = min64(kFewTile, a.rows - row);
    kTiles[rows - 1](x + row * padded, padded, matrix, a.matrix.stride, a.depth, sums);
    for (std::int64_t r = 0; r < rows; ++r)
      for (int e = 0; e < Entries; ++e) {
        const float sum = sums[r * Entries + e];
        if (!(sum <= c.thresholds[row + r])) offer(c, row + r, entry + e, sum);
      }
  }
}

template <int Group, int Vecs>
void run(const ProjectArgs& a, std::int64_t begin, std::int64_t end, std::byte* scratch, Candidates& c) {
  constexpr int kFewEntries = kWidth >= 16 ? 4 : 2;
  const Workspace<Group, Vecs> workspace(scratch);
  with_type(a.matrix.dtype, [&](auto element) {
    using E = decltype(element);
    if (a.rows > kFewRows) {
      for (; begin < end; begin += kEntries) run_tile<E>(a, begin, min64(kEntries, end - begin), workspace, c);
      return;
    }
    for (; begin + kFewEntries <= end; begin += kFewEntries) few_rows<E, kFewEntries>(a, begin, c);
    for (; begin < end; ++begin) few_rows<E, 1>(a, begin, c);
  });
}

// Group entries times Vecs vectors of rows fill the registers.
template <int Group, int Vecs>
constexpr ProjectKernel kernel = {
    packed_bytes<Vecs>, pack<Vecs>, Workspace<Group, Vecs>::bytes, run<Group, Vecs>, Vecs * kWidth, kEntries,
};

}  // namespace
}  // namespace qtale::cpu::projection

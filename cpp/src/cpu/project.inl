// x times a vocabulary over the Vec of the including file's instruction set. The lanes are rows of x and entries are
// broadcast, so nothing of the matrix is transposed.
#pragma once

#include "cpu/project_few.inl"

namespace qtale::cpu::projection {
namespace {

// What one thread needs: a ring of groups of entries as float32, one more than a tile has, and the sums of one tile
// [panels][entries][lanes].
template <int Group, int Vecs>
struct Workspace {
  static_assert(kEntries % Group == 0);
  static constexpr std::int64_t kSlots = kEntries / Group + 1;
  float* slots;
  float* sums;
  explicit Workspace(std::byte* scratch)
      : slots(reinterpret_cast<float*>(scratch)), sums(slots + kSlots * Group * kStride) {}
  float* slot(std::int64_t i) const { return slots + i % kSlots * Group * kStride; }
  static std::size_t bytes(std::int64_t rows) {
    const std::int64_t lanes = rows <= kFewRows ? 0 : round_up(rows, Vecs * kWidth);
    return static_cast<std::size_t>(kSlots * Group * kStride + kEntries * lanes) * sizeof(float);
  }
};

// What a tile does beside its products in each of kStep turns of a round: nothing,
struct Idle {
  template <int Turn>
  QTALE_INLINE void turn(std::integral_constant<int, Turn>) {}
};
// or a Group-th of converting the group of entries that comes next, for which its inner loop has time. It asks for
// memory that will be converted one block later.
template <class E, int Group>
struct Converter {
  static_assert(Group < kStep);
  const typename E::T* from;
  std::int64_t stride;
  std::int64_t ahead;  // bytes
  float* to;
  template <int Turn>
  QTALE_INLINE void turn(std::integral_constant<int, Turn>) {
    if constexpr (Turn < Group) {
      __builtin_prefetch(reinterpret_cast<const char*>(from) + ahead, 0, 2);
      for (int i = 0; i < kStep; i += kWidth) store_f32(to + Turn * kStride + i, E::load(from + i));
      from += stride;
    } else if constexpr (Turn == kStep - 1) {
      from += kStep - Group * stride;
      to += kStep;
    }
  }
};

// Adds Group entries [Group][kStride] times one panel of x [depth][lanes] to sums [Group][lanes], or begins them.
template <int Group, int Vecs, int Used, class Beside>
__attribute__((noipa)) void tile_products(const float* x, const float* entries, std::int64_t rounds, bool begins,
                                          Beside beside, float* sums) {
  constexpr int kPanel = Vecs * kWidth;
  VecF acc[Group][Used];
  unroll<Group>([&](auto e)
                    QTALE_INLINE_LAMBDA { unroll<Used>([&](auto p) QTALE_INLINE_LAMBDA { acc[e][p] = set1(0.0f); }); });
#pragma GCC unroll 1
  for (std::int64_t r = 0; r < rounds; ++r) {
    unroll<kStep>([&](auto i) QTALE_INLINE_LAMBDA {
      VecF row[Used];
      unroll<Used>([&](auto p) QTALE_INLINE_LAMBDA { row[p] = load_f32(x + i * kPanel + p * kWidth); });
      unroll<Group>([&](auto e) QTALE_INLINE_LAMBDA {
        const VecF entry = set1(entries[e * kStride + i]);
        unroll<Used>([&](auto p) QTALE_INLINE_LAMBDA { accumulate(acc[e][p], entry, row[p]); });
      });
      beside.turn(i);
    });
    x += kStep * kPanel;
    entries += kStep;
  }
  unroll<Group>([&](auto e) QTALE_INLINE_LAMBDA {
    unroll<Used>([&](auto p) QTALE_INLINE_LAMBDA {
      float* sum = sums + e * kPanel + p * kWidth;
      store_f32(sum, begins ? acc[e][p] : add(load_f32(sum), acc[e][p]));
    });
  });
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

// Entries as they lie in the matrix: `rows` of them, `depth` deep.
template <class E>
struct Source {
  const typename E::T* at;
  std::int64_t rows;
  std::int64_t depth;
};

// A chunk of entries times all rows. While one group of entries is multiplied with the first panel of rows, the group
// that comes next is converted: of the same block of the depth, of the next one, or of the next tile.
template <class E, int Group, int Vecs>
class ManyRows {
 public:
  ManyRows(const ProjectArgs& a, std::byte* scratch, Candidates& c)
      : a_(a), c_(c), w_(scratch), block_(block_depth(a.depth)), padded_(round_up(a.depth, kStep)) {}

  void run(std::int64_t begin, std::int64_t end) {
    convert(source(begin, end, 0), 0, w_.slot(slot_));
    for (; begin < end; begin += kEntries) run_tile(begin, min64(begin + kEntries, end), end);
  }

 private:
  static constexpr std::int64_t kPanel = Vecs * kWidth;

  const typename E::T* at(std::int64_t entry, std::int64_t depth) const {
    return static_cast<const typename E::T*>(a_.matrix.data) + entry * a_.matrix.stride + depth;
  }
  Source<E> source(std::int64_t entry, std::int64_t end, std::int64_t depth) const {
    return {at(entry, depth), min64(Group, end - entry), min64(block_, a_.depth - depth)};
  }

  // From some depth on, with zeros up to whole rounds.
  void convert(const Source<E>& s, std::int64_t depth, float* to) const {
    if (depth >= s.depth) return;
    for (std::int64_t e = 0; e < s.rows; ++e) {
      const typename E::T* from = s.at + e * a_.matrix.stride;
      for (std::int64_t i = depth; i < round_up(s.depth, kStep); i += kWidth)
        store_f32(to + e * kStride + i,
                  i + kWidth <= s.depth ? E::load(from + i) : load_part<E>(from + i, s.depth - i));
    }
  }

  template <class Beside>
  void multiply(const float* x, std::int64_t rows, std::int64_t slot, std::int64_t depth, std::int64_t begin,
                const Beside& beside, float* sums) const {
    const auto tile = rows > kWidth ? tile_products<Group, Vecs, Vecs, Beside> : tile_products<Group, Vecs, 1, Beside>;
    tile(x, w_.slot(slot), round_up(depth, kStep) / kStep, begin == 0, beside, sums);
  }

  void run_tile(std::int64_t entry, std::int64_t end, std::int64_t chunk_end) {
    const std::int64_t groups = (end - entry + Group - 1) / Group;
    for (std::int64_t begin = 0; begin < a_.depth || begin == 0; begin += block_, slot_ += groups) {
      const std::int64_t depth = min64(block_, a_.depth - begin);
      const bool last = begin + block_ >= a_.depth;
      const float* x = reinterpret_cast<const float*>(a_.packed) + begin * kPanel;
      float* sums = w_.sums;
      for (std::int64_t row = 0; row < a_.rows; row += kPanel, x += padded_ * kPanel, sums += kEntries * kPanel) {
        const std::int64_t rows = min64(kPanel, a_.rows - row);
        for (std::int64_t g = 0; g < groups; ++g) {
          float* const out = sums + g * Group * kPanel;
          if (row > 0) {
            multiply(x, rows, slot_ + g, depth, begin, Idle{}, out);
            continue;
          }
          const Source<E> next = g + 1 < groups ? source(entry + (g + 1) * Group, end, begin)
                                 : !last        ? source(entry, end, begin + block_)
                                                : source(end, min64(end + kEntries, chunk_end), 0);
          const auto* ahead = last ? at(end + g * Group, 0) : at(entry + g * Group, begin + block_);
          multiply_first(x, rows, slot_ + g, depth, begin, next, ahead, out);
        }
        if (last) select<Vecs>(sums, entry, end - entry, row, rows, c_);
      }
    }
  }

  // Products with the first panel of rows; converts the next source.
  void multiply_first(const float* x, std::int64_t rows, std::int64_t slot, std::int64_t depth, std::int64_t begin,
                      const Source<E>& next, const typename E::T* ahead, float* sums) const {
    float* const to = w_.slot(slot + 1);
    const std::int64_t whole = round_up(depth, kStep);
    if (next.rows == Group && next.depth >= whole) {
      const std::int64_t distance = reinterpret_cast<const char*>(ahead) - reinterpret_cast<const char*>(next.at);
      multiply(x, rows, slot, depth, begin, Converter<E, Group>{next.at, a_.matrix.stride, distance, to}, sums);
      convert(next, whole, to);
    } else {
      multiply(x, rows, slot, depth, begin, Idle{}, sums);
      convert(next, 0, to);
    }
  }

  const ProjectArgs& a_;
  Candidates& c_;
  Workspace<Group, Vecs> w_;
  std::int64_t block_, padded_;
  std::int64_t slot_ = 0;  // of the first group of a block
};

template <int Group, int Vecs>
void run(const ProjectArgs& a, std::int64_t begin, std::int64_t end, std::byte* scratch, Candidates& c) {
  constexpr int kFewEntries = kWidth >= 16 ? 4 : 2;
  with_type(a.matrix.dtype, [&](auto element) {
    using E = decltype(element);
    if (a.rows > kFewRows) return ManyRows<E, Group, Vecs>(a, scratch, c).run(begin, end);
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

// x times a matrix over the Vec of the including file's instruction set. The lanes are rows of x and entries are
// broadcast, so nothing of the matrix is transposed.
#pragma once

#include "cpu/project_few.inl"

namespace qtale::cpu::projection {
namespace {

// What one thread needs: a ring of groups of entries as float32, one more than a tile has, the sums of one tile
// [panels][entries][lanes], and a level of unfinished sums for each halving of the lanes.
template <int Group, int Vecs>
struct Workspace {
  static_assert(kEntries % Group == 0);
  static constexpr std::int64_t kSlots = kEntries / Group + 1;
  static constexpr std::int64_t kLevel = Group * Vecs * kWidth;
  float* slots;
  float* levels;
  float* sums;
  explicit Workspace(std::byte* scratch)
      : slots(reinterpret_cast<float*>(scratch)),
        levels(slots + kSlots * Group * kDepth),
        sums(levels + kHalvings * kLevel) {}
  float* slot(std::int64_t i) const { return slots + i % kSlots * Group * kDepth; }
  static std::size_t bytes(std::int64_t rows) {
    const std::int64_t lanes = rows <= kFewRows ? 0 : round_up(rows, Vecs * kWidth);
    return static_cast<std::size_t>(kSlots * Group * kDepth + kHalvings * kLevel + kEntries * lanes) * sizeof(float);
  }
};

// What a chain does beside its products: nothing,
struct Idle {
  QTALE_INLINE void step() {}
};
// or converting an entry of the group that comes next, for which its loop has time. It asks for memory that will be
// converted one block later.
template <class Lane, class E, int Group>
struct Converter {
  const typename E::T* from;
  std::int64_t ahead;  // bytes
  float* to;
  QTALE_INLINE void step() {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + ahead, 0, 2);
    store_f32(to, Lane::template load<E>(from));
    from += kWidth * Lane::kNumbers;
    to += Group * kWidth;
  }
};

// Where the sum of a chain goes: `levels` of unfinished sums [Group][lanes] are added to it, in order, and with `adds`
// what `out` holds.
struct Merge {
  const float* level;
  int levels;
  bool adds;
  float* out;
};

// One chain: Group entries [steps][Group][kWidth], of which it takes one lane, times one panel of x [steps][lanes].
template <class Lane, int Group, int Vecs, int Used, class Beside>
__attribute__((noipa)) void tile_chain(const float* x, const float* entries, std::int64_t steps, Beside beside,
                                       const Merge& merge) {
  constexpr int kPanel = Vecs * kWidth;
  VecF acc[Group][Used];
  unroll<Group>([&](auto e)
                    QTALE_INLINE_LAMBDA { unroll<Used>([&](auto p) QTALE_INLINE_LAMBDA { acc[e][p] = set1(0.0f); }); });
#pragma GCC unroll 1
  for (const float* const end = x + steps * kPanel; x != end; x += kPanel, entries += Group * kWidth) {
    VecF row[Used];
    unroll<Used>([&](auto p) QTALE_INLINE_LAMBDA { row[p] = load_f32(x + p * kWidth); });
    unroll<Group>([&](auto e) QTALE_INLINE_LAMBDA {
      const VecF entry = set1(entries[e * kWidth]);
      unroll<Used>([&](auto p) QTALE_INLINE_LAMBDA { Lane::accumulate(acc[e][p], entry, row[p]); });
    });
    beside.step();
  }
  const auto add_all = [&](const float* from) QTALE_INLINE_LAMBDA {
    unroll<Group>([&](auto e) QTALE_INLINE_LAMBDA {
      unroll<Used>([&](auto p)
                       QTALE_INLINE_LAMBDA { acc[e][p] = add(load_f32(from + e * kPanel + p * kWidth), acc[e][p]); });
    });
  };
  for (int i = 0; i < merge.levels; ++i) add_all(merge.level + i * Group * kPanel);
  if (merge.adds) add_all(merge.out);
  unroll<Group>([&](auto e) QTALE_INLINE_LAMBDA {
    unroll<Used>([&](auto p) QTALE_INLINE_LAMBDA { store_f32(merge.out + e * kPanel + p * kWidth, acc[e][p]); });
  });
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
template <class Lane, class E, int Group, int Vecs, class Sink>
class ManyRows {
 public:
  ManyRows(const ProjectArgs& a, std::byte* scratch, const Sink& sink)
      : a_(a),
        sink_(sink),
        w_(scratch),
        depth_(a.depth / Lane::kNumbers),
        block_(block_depth(depth_)),
        padded_(round_up(depth_, kWidth)) {}

  void run(std::int64_t begin, std::int64_t end) {
    convert(source(begin, end, 0), 0, w_.slot(slot_));
    for (; begin < end; begin += kEntries) run_tile(begin, min64(begin + kEntries, end), end);
  }

 private:
  static constexpr std::int64_t kPanel = Vecs * kWidth;
  static_assert(Group <= kWidth);

  // One block of one group times one panel.
  struct Product {
    const float* x;
    const float* entries;
    std::int64_t rows;
    std::int64_t steps;
    bool begins;
    float* sums;
  };

  const typename E::T* at(std::int64_t entry, std::int64_t depth) const {
    return static_cast<const typename E::T*>(a_.matrix.data) + entry * a_.matrix.stride + depth * Lane::kNumbers;
  }
  Source<E> source(std::int64_t entry, std::int64_t end, std::int64_t depth) const {
    return {at(entry, depth), min64(Group, end - entry), min64(block_, depth_ - depth)};
  }

  // From some depth on, with zeros up to whole vectors.
  void convert(const Source<E>& s, std::int64_t depth, float* to) const {
    for (std::int64_t e = 0; e < s.rows; ++e) {
      const typename E::T* from = s.at + e * a_.matrix.stride;
      make_lanes<Lane, E>(from + depth * Lane::kNumbers, s.depth - depth, to + depth * Group + e * kWidth,
                          Group * kWidth);
    }
  }

  // All chains of a product; `beside(chain)` gives what one of them does beside.
  template <class Beside, class MakeBeside>
  void multiply(const Product& p, int begin, int end, const MakeBeside& beside) const {
    const auto tile =
        p.rows > kWidth ? tile_chain<Lane, Group, Vecs, Vecs, Beside> : tile_chain<Lane, Group, Vecs, 1, Beside>;
    for (int chain = begin; chain < end; ++chain) {
      const int level = __builtin_ctz(~static_cast<unsigned>(chain));  // pairs that this chain completes
      const bool last = level == kHalvings;
      float* const out = last ? p.sums : w_.levels + level * w_.kLevel;
      tile(p.x + chain * p.steps * kPanel, p.entries + reversed(chain), p.steps, beside(chain),
           {w_.levels, level, last && !p.begins, out});
    }
  }

  void run_tile(std::int64_t entry, std::int64_t end, std::int64_t chunk_end) {
    const std::int64_t groups = (end - entry + Group - 1) / Group;
    for (std::int64_t begin = 0; begin < depth_ || begin == 0; begin += block_, slot_ += groups) {
      const std::int64_t depth = min64(block_, depth_ - begin);
      const bool last = begin + block_ >= depth_;
      const float* x = reinterpret_cast<const float*>(a_.packed) + begin * kPanel;
      float* sums = w_.sums;
      for (std::int64_t row = 0; row < a_.rows; row += kPanel, x += padded_ * kPanel, sums += kEntries * kPanel) {
        const std::int64_t rows = min64(kPanel, a_.rows - row);
        for (std::int64_t g = 0; g < groups; ++g) {
          const Product product{x,          w_.slot(slot_ + g),  rows, (depth + kWidth - 1) / kWidth,
                                begin == 0, sums + g * w_.kLevel};
          if (row > 0) {
            multiply<Idle>(product, 0, kWidth, [](int) { return Idle{}; });
            continue;
          }
          const Source<E> next = g + 1 < groups ? source(entry + (g + 1) * Group, end, begin)
                                 : !last        ? source(entry, end, begin + block_)
                                                : source(end, min64(end + kEntries, chunk_end), 0);
          const auto* ahead = last ? at(end + g * Group, 0) : at(entry + g * Group, begin + block_);
          multiply_first(product, next, ahead, w_.slot(slot_ + g + 1));
        }
        if (last) sink_.template panel<Vecs>(sums, entry, end - entry, row, rows);
      }
    }
  }

  // Products with the first panel of rows; converts the next source.
  void multiply_first(const Product& p, const Source<E>& next, const typename E::T* ahead, float* to) const {
    const std::int64_t whole = p.steps * kWidth;
    const bool beside = next.rows == Group && next.depth >= whole;
    if (beside) {
      const std::int64_t distance = reinterpret_cast<const char*>(ahead) - reinterpret_cast<const char*>(next.at);
      multiply<Converter<Lane, E, Group>>(p, 0, Group, [&](int chain) {
        return Converter<Lane, E, Group>{next.at + chain * a_.matrix.stride, distance, to + chain * kWidth};
      });
    }
    multiply<Idle>(p, beside ? Group : 0, kWidth, [](int) { return Idle{}; });
    convert(next, beside ? whole : 0, to);
  }

  const ProjectArgs& a_;
  const Sink& sink_;
  Workspace<Group, Vecs> w_;
  std::int64_t depth_, block_, padded_;  // lanes
  std::int64_t slot_ = 0;                // of the first group of a block
};

template <class Lane, int Group, int Vecs, class Sink>
void run(const ProjectArgs& a, std::int64_t begin, std::int64_t end, std::byte* scratch, const Sink& sink) {
  with_type(a.matrix.dtype, [&](auto element) {
    using E = decltype(element);
    if (a.rows > kFewRows) return ManyRows<Lane, E, Group, Vecs, Sink>(a, scratch, sink).run(begin, end);
    if (a.rows <= kStreamRows || kStreamRows == kFewTile) return few_rows<Lane, E, 4, kStreamRows>(a, begin, end, sink);
    if constexpr (kStreamRows < kFewTile) return few_rows<Lane, E, 2, kFewTile>(a, begin, end, sink);
  });
}

template <class Lane, int Group, int Vecs>
void find(const ProjectArgs& a, std::int64_t begin, std::int64_t end, std::byte* scratch, Candidates& c) {
  run<Lane, Group, Vecs>(a, begin, end, scratch, Offer{c});
}
template <class Lane, int Group, int Vecs>
void store(const ProjectArgs& a, std::int64_t begin, std::int64_t end, std::byte* scratch, const ProjectOut& out) {
  run<Lane, Group, Vecs>(a, begin, end, scratch, Store{out});
}

// Group entries times Vecs vectors of rows fill the registers.
template <int Group, int Vecs, class Lane = SingleLane>
constexpr ProjectKernel kernel = {
    packed_bytes<Lane, Vecs>,
    pack<Lane, Vecs>,
    Workspace<Group, Vecs>::bytes,
    find<Lane, Group, Vecs>,
    store<Lane, Group, Vecs>,
    Vecs * kWidth,
    kEntries,
    Group,
};

}  // namespace
}  // namespace qtale::cpu::projection

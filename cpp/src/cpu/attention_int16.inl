// Attention of a block of queries over one span of the cache with queries, keys, weights and values rounded to integers
// of up to 14 bits where they are multiplied: AVX2 makes half as many products again of these as of float32. Each query
// and each entry has a scale of its own, weights have one for the entries of a chunk that the query sees, so what a
// query meets does not depend on its neighbours.
#pragma once

#include "cpu/attention.inl"
#include "cpu/attention_int16_tile.inl"

namespace qtale::cpu::attending {
namespace {

constexpr std::int64_t kCodedQueries = 384;  // of a block: what codes of a chunk cost is shared by so many

// Memory of one thread.
struct CodedWorkspace {
  std::int16_t* queries;   // [queries, kCodeStride]
  std::int16_t* keys;      // [depth / 2, kCodedChunk] pairs
  std::int16_t* values;    // [kCodedChunk / 2, depth] pairs
  std::int16_t* weights;   // [kTileRows, kCodedChunk]
  float* scores;           // [kTileRows, kCodedChunk]
  float* key_scales;       // [kCodedChunk]
  float* value_scales;     // [kCodedChunk]
  float* multipliers;      // [kCodedChunk], of queries that see all of it
  float* own_multipliers;  // [kCodedChunk], of others
  float* most;             // [kWidth, kWidth]
  float* factors;          // [kMaxQueries]
  float* weight_scales;    // [kMaxQueries]
  float* query_scales;     // [queries]
  Range* ranges;           // [queries]

  CodedWorkspace(std::byte* memory, std::int64_t count, std::int64_t head_dim)
      : queries(reinterpret_cast<std::int16_t*>(memory)),
        keys(queries + count * kCodeStride),
        values(keys + kCodedChunk * head_dim),
        weights(values + kCodedChunk * head_dim + kValueSlack),
        scores(reinterpret_cast<float*>(weights + kTileRows * kCodedChunk)),
        key_scales(scores + kTileRows * kCodedChunk),
        value_scales(key_scales + kCodedChunk),
        multipliers(value_scales + kCodedChunk),
        own_multipliers(multipliers + kCodedChunk),
        most(own_multipliers + kCodedChunk),
        factors(most + kWidth * kWidth),
        weight_scales(factors + kMaxQueries),
        query_scales(weight_scales + kMaxQueries),
        ranges(reinterpret_cast<Range*>(query_scales + round_up(count, 16))) {}
  static std::size_t bytes(std::int64_t count, std::int64_t head_dim) {
    const std::int64_t halves =
        count * kCodeStride + 2 * kCodedChunk * head_dim + kValueSlack + kTileRows * kCodedChunk;
    const std::int64_t floats =
        kWidth * kWidth + (kTileRows + 4) * kCodedChunk + 2 * kMaxQueries + 3 * round_up(count, 16);
    return static_cast<std::size_t>(halves) * sizeof(std::int16_t) + static_cast<std::size_t>(floats) * sizeof(float);
  }

  static constexpr std::int64_t kValueSlack = 32;  // a second vector may be read where only one is there
};

template <class E>
class CodedSpan : BlockSpan<E, kCodedChunk> {
  using Base = BlockSpan<E, kCodedChunk>;

 public:
  CodedSpan(const AttentionArgs& a, const AttentionBlock& b, std::int64_t begin, std::int64_t end, std::byte* scratch,
            std::byte* state)
      : Base(a, b, begin, end, CodedWorkspace(scratch, b.rows * a.group, a.head_dim).ranges, state),
        w_(scratch, count_, a.head_dim) {}

  void run() {
    state_.clear(count_);
    if (begin_ >= end_) return;
    const std::int64_t tiles = (count_ + kTileRows - 1) / kTileRows;
    for (std::int64_t at = begin_ / kCodedChunk * kCodedChunk; at < end_; at += kCodedChunk) {
      set_ranges(at);
      wild_ = 0;
      for (int p = 0; p < kCodedChunk / kPageTokens; ++p) {
        const std::int64_t entry = at + p * kPageTokens;
        if (entry + kPageTokens <= begin_ || entry >= end_) continue;
        code_keys(page(entry), p);
        code_values(page(entry) + values_at_, p);
      }
      // Scales of entries that nothing was stored in are any numbers; then no query sees the whole chunk.
      worth_ = make_multipliers({0, kCodedChunk}, w_.multipliers);
      typename Base::Ahead next = this->pages_ahead(at + kCodedChunk);
      const std::int64_t lines = (next.lines() + tiles - 1) / tiles;
      for (std::int64_t begin = 0, rest = tiles; rest > 0; --rest) {
        const std::int64_t end = begin + (count_ - begin) / rest;
        next.ask(lines);
        run_tile(begin, end);
        begin = end;
      }
    }
  }

 private:
  // Keys of a page lie by dimensions, so lanes are entries.
  void code_keys(const typename E::T* from, int p) const {
    const std::int64_t depth = a_.head_dim;
    for (int half = 0; half < kPageTokens / kWidth; ++half, from += kWidth) {
      VecI amax = zero_bits();
      for (std::int64_t d = 0; d < depth; ++d) amax = max_bits(amax, abs_bits(E::load(from + d * kPageTokens)));
      const CodeScale code = code_scale(amax, kKeyTop);
      const std::int64_t entry = p * kPageTokens + half * kWidth;
      store_f32(w_.key_scales + entry, code.scale);
      std::int16_t* to = w_.keys + 2 * entry;
      for (std::int64_t d = 0; d < depth; d += 2, to += 2 * kCodedChunk) {
        const auto* pair = from + d * kPageTokens;
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), code_pairs(mul(E::load(pair), code.inverse),
                                                                      mul(E::load(pair + kPageTokens), code.inverse)));
      }
    }
  }

  // Values lie by entries, so lanes are dimensions. Entries that are not finite are noted: they have no codes.
  void code_values(const typename E::T* from, int p) {
    const std::int64_t depth = a_.head_dim;
    alignas(32) float inverse[kPageTokens];
    alignas(32) std::uint32_t amax[kPageTokens];
    for (std::int64_t j = 0; j < kPageTokens; ++j) {
      VecI bits = zero_bits();
      for (std::int64_t d = 0; d < depth; d += kWidth) bits = max_bits(bits, abs_bits(E::load(from + j * depth + d)));
      amax[j] = reduce_max_bits(bits);
    }
    for (std::int64_t j = 0; j < kPageTokens; j += kWidth) {
      const CodeScale code = code_scale(_mm256_load_si256(reinterpret_cast<const __m256i*>(amax + j)), kValueTop);
      const VecF wild = _mm256_cmp_ps(code.scale, code.scale, _CMP_UNORD_Q);
      const std::int64_t entry = p * kPageTokens + j;
      wild_ |= static_cast<std::uint64_t>(_mm256_movemask_ps(wild)) << entry;
      store_f32(w_.value_scales + entry, _mm256_andnot_ps(wild, code.scale));
      store_f32(inverse + j, code.inverse);
    }
    std::int16_t* to = w_.values + p * kPageTokens * depth;
    for (std::int64_t j = 0; j < kPageTokens; j += 2, from += 2 * depth) {
      const VecF first = set1(inverse[j]), second = set1(inverse[j + 1]);
      for (std::int64_t d = 0; d < depth; d += kWidth, to += 2 * kWidth)
        _mm256_store_si256(reinterpret_cast<__m256i*>(to),
                           code_pairs(mul(E::load(from + d), first), mul(E::load(from + depth + d), second)));
    }
  }

  void run_tile(std::int64_t begin, std::int64_t end) const {
    const int vecs = vectors_seen(begin, end);
    if (vecs == 0) return;
    const auto rows = static_cast<int>(end - begin);
    kPairScores[rows - 1](w_.queries + begin * kCodeStride, w_.query_scales + begin, w_.keys, w_.key_scales,
                          a_.head_dim, vecs, w_.scores);
    whole_ ? weigh_tile<true>(begin, rows) : weigh_tile<false>(begin, rows);
    kPairValues[rows - 1](w_.weights, w_.weight_scales, w_.factors, w_.values, vecs * kWidth / 2,
                          state_.sums + begin * state_.stride, state_.stride);
  }

  // What weights are multiplied by to make codes: the scales of the values in `range`, of which the largest becomes
  // kWeightTop. Returns what a code is worth, or 0 where scales are so far apart that large values of little weight
  // would take the codes of all others: each query codes by what is largest for it then.
  float make_multipliers(const Range& range, float* to) const {
    VecF scales[kCodedVecs];
    VecF least = set1(FLT_MAX);
    for (int p = 0; p < kCodedVecs; ++p) {
      scales[p] = keep_seen(load_f32(w_.value_scales + p * kWidth), range, p, set1(0.0f));
      const VecF some = _mm256_cmp_ps(scales[p], set1(0.0f), _CMP_GT_OQ);
      least = min(least, _mm256_blendv_ps(set1(FLT_MAX), scales[p], some));
    }
    const float top = reduce_max(largest(scales));
    if (!(top <= kFarApart * reduce_min(least))) return 0.0f;
    for (int p = 0; p < kCodedVecs; ++p) store_f32(to + p * kWidth, mul(scales[p], set1(kWeightTop / top)));
    return top * (1.0f / kWeightTop);
  }

  // Weights of one query as codes by the largest of them times the scale of its value; returns what a code is worth.
  float code_apart(const VecF (&weights)[kCodedVecs], const Range& range, VecF (&codes)[kCodedVecs]) const {
    for (int p = 0; p < kCodedVecs; ++p)
      codes[p] = keep_seen(mul(weights[p], load_f32(w_.value_scales + p * kWidth)), range, p, set1(0.0f));
    const float top = reduce_max(largest(codes));
    const bool used = top >= kLeastCoded / kValueTop;
    for (int p = 0; p < kCodedVecs; ++p) codes[p] = mul(codes[p], set1(used ? kWeightTop / top : 0.0f));
    return used ? top * (1.0f / kWeightTop) : 0.0f;
  }

  // Turns the scores of a tile into weights relative to the largest of the chunk, codes these times the scales of the
  // values, and updates tops and totals. All queries take each step together: none waits for the end of its own chain.
  template <bool Whole>
  void weigh_tile(std::int64_t begin, int rows) const {
    alignas(32) float tops[kWidth], shares[kWidth];
    for (int r = 0; r < rows; ++r) {
      VecF x[kCodedVecs];
      load_scores<kCodedVecs>(w_.scores + r * kCodedChunk, range_of<Whole>(begin + r), x);
      store_f32(w_.most + r * kWidth, largest(x));
    }
    // Lanes of no query in the tile keep what they have.
    const VecF top = max(reduce_max_each(w_.most), set1(-FLT_MAX)), before = load_f32(state_.tops + begin);
    const VecF after = max(top, before);
    store_f32(tops, top);
    store_f32(state_.tops + begin, keep_lanes(after, 0, rows, before));
    store_f32(shares, exp2_down(sub(top, after)));
    store_f32(w_.factors, exp2_down(sub(before, after)));
    for (int r = 0; r < rows; ++r) {
      const Range range = range_of<Whole>(begin + r);
      const bool all = range.all(kCodedChunk);
      const float worth = all ? worth_ : make_multipliers(range, w_.own_multipliers);
      w_.weight_scales[r] = shares[r] * weigh_row(r, range, all ? w_.multipliers : w_.own_multipliers, worth, tops[r],
                                                  shares[r], state_.totals + (begin + r) * kWidth);
      if (wild_ != 0) spoil(begin + r, range);
    }
  }

  template <bool Whole>
  Range range_of(std::int64_t query) const {
    return Whole ? Range{0, kCodedChunk} : ranges_[query];
  }

  // Codes the weights of one query, adds to its totals and returns what a code is worth.
  float weigh_row(int r, const Range& range, const float* multipliers, float worth, float top, float share,
                  float* totals) const {
    VecF x[kCodedVecs], codes[kCodedVecs];
    load_scores<kCodedVecs>(w_.scores + r * kCodedChunk, range, x);
    unroll<kCodedVecs>([&](auto p) QTALE_INLINE_LAMBDA { x[p] = exp2_coded(sub(x[p], set1(top))); });
    if (worth > 0.0f) {
      unroll<kCodedVecs>([&](auto p) QTALE_INLINE_LAMBDA { codes[p] = mul(x[p], load_f32(multipliers + p * kWidth)); });
    } else {
      worth = code_apart(x, range, codes);
    }
    auto* const to = reinterpret_cast<__m256i*>(w_.weights + r * kCodedChunk);
    unroll<kCodedVecs / 2>([&](auto p) QTALE_INLINE_LAMBDA {
      const __m256i low = _mm256_cvtps_epi32(codes[2 * p]), high = _mm256_cvtps_epi32(codes[2 * p + 1]);
      _mm256_store_si256(to + p, _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8));
    });
    const VecF sum = add(add(add(x[0], x[1]), add(x[2], x[3])), add(add(x[4], x[5]), add(x[6], x[7])));
    store_f32(totals, multiply_add(load_f32(totals), set1(w_.factors[r]), mul(sum, set1(share))));
    return worth;
  }

  static VecF largest(const VecF (&x)[kCodedVecs]) {
    return max(max(max(x[0], x[1]), max(x[2], x[3])), max(max(x[4], x[5]), max(x[6], x[7])));
  }

  // A query that sees values which are not finite has no result.
  void spoil(std::int64_t query, const Range& range) const {
    const auto before = [](int entry) { return entry < 64 ? (std::uint64_t{1} << entry) - 1 : ~std::uint64_t{0}; };
    if ((before(range.end) & ~before(range.begin) & wild_) != 0)
      state_.totals[query * kWidth] = std::numeric_limits<float>::quiet_NaN();
  }

  using Base::a_, Base::begin_, Base::end_, Base::count_, Base::ranges_, Base::state_, Base::whole_;
  using Base::page, Base::set_ranges, Base::values_at_, Base::vectors_seen;

  CodedWorkspace w_;
  float worth_ = 0;         // what make_multipliers returned for queries that see the whole chunk
  std::uint64_t wild_ = 0;  // one bit for each entry of the chunk whose values are not all finite
};
static_assert(kCodedChunk == 64 && kAttentionSpan % kCodedChunk == 0 && kTileRows <= kWidth);

// Heads of other sizes stay in float32.
inline bool in_pairs(const AttentionArgs& a) { return a.head_dim % kWidth == 0; }

inline std::size_t coded_scratch_bytes(const AttentionArgs& a, std::int64_t queries) {
  return in_pairs(a) ? CodedWorkspace::bytes(queries, a.head_dim) : scratch_bytes(a, queries);
}

inline void prepare_coded(const AttentionArgs& a, const AttentionBlock& b, std::byte* scratch) {
  if (!in_pairs(a)) return prepare(a, b, scratch);
  const std::int64_t count = b.rows * a.group;
  const CodedWorkspace w(scratch, count, a.head_dim);
  for (std::int64_t i = 0; i < count; ++i) {
    const float* const from = heads_at(a.q, a, b, i);
    prefetch_head(heads_at(a.q, a, b, min64(i + kHeadsAhead, count - 1)), a.head_dim);
    VecI amax = zero_bits();
    for (std::int64_t d = 0; d < a.head_dim; d += kWidth) amax = max_bits(amax, abs_bits(load_f32(from + d)));
    const CodeScale code = code_scale(_mm256_set1_epi32(static_cast<int>(reduce_max_bits(amax))), kQueryTop);
    w.query_scales[i] = _mm256_cvtss_f32(code.scale) * (a.scale * 1.44269504f);
    for (std::int64_t d = 0; d < a.head_dim; d += kWidth) {
      const __m256i codes = _mm256_cvtps_epi32(mul(load_f32(from + d), code.inverse));
      _mm_store_si128(reinterpret_cast<__m128i*>(w.queries + i * kCodeStride + d),
                      _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1)));
    }
  }
}

template <int TileRows, int TileVecs>
void run_coded(const AttentionArgs& a, const AttentionBlock& b, std::int64_t begin, std::int64_t end,
               std::byte* scratch, std::byte* state) {
  if (!in_pairs(a)) return run<TileRows, TileVecs>(a, b, begin, end, scratch, state);
  if (a.dtype == DType::f16) return CodedSpan<F16>(a, b, begin, end, scratch, state).run();
  CodedSpan<F32>(a, b, begin, end, scratch, state).run();
}

template <int TileRows, int TileVecs>
constexpr AttentionKernel coded_kernel = {
    kCodedQueries, state_bytes, coded_scratch_bytes, prepare_coded, run_coded<TileRows, TileVecs>, merge, finish,
};

}  // namespace
}  // namespace qtale::cpu::attending

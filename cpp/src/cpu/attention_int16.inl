// Attention of a block of queries over one span of the cache with queries, keys, weights and values rounded to integers
// of up to 14 bits where they are multiplied: AVX2 makes half as many products again of these as of float32. Each query
// and each entry has a scale of its own, so what a query meets does not depend on its neighbours.
#pragma once

#include "cpu/attention.inl"
#include "cpu/attention_int16_tile.inl"

namespace qtale::cpu::attending {
namespace {

// Memory of one thread.
struct CodedWorkspace {
  std::int16_t* queries;  // [queries, kCodeStride]
  std::int16_t* keys;     // [depth / 2, kChunk] pairs
  std::int16_t* values;   // [kChunk / 2, depth] pairs
  std::int16_t* weights;  // [kTileRows, kChunk]
  float* scores;          // [kTileRows, kChunk]
  float* key_scales;      // [kChunk]
  float* value_scales;    // [kChunk]
  float* factors;         // [kMaxQueries]
  float* weight_scales;   // [kMaxQueries]
  float* query_scales;    // [queries]
  Range* ranges;          // [queries]

  CodedWorkspace(std::byte* memory, std::int64_t count, std::int64_t head_dim)
      : queries(reinterpret_cast<std::int16_t*>(memory)),
        keys(queries + count * kCodeStride),
        values(keys + kChunk * head_dim),
        weights(values + kChunk * head_dim + kValueSlack),
        scores(reinterpret_cast<float*>(weights + kTileRows * kChunk)),
        key_scales(scores + kTileRows * kChunk),
        value_scales(key_scales + kChunk),
        factors(value_scales + kChunk),
        weight_scales(factors + kMaxQueries),
        query_scales(weight_scales + kMaxQueries),
        ranges(reinterpret_cast<Range*>(query_scales + round_up(count, 16))) {}
  static std::size_t bytes(std::int64_t count, std::int64_t head_dim) {
    const std::int64_t halves = count * kCodeStride + 2 * kChunk * head_dim + kValueSlack + kTileRows * kChunk;
    const std::int64_t floats = (kTileRows + 2) * kChunk + 2 * kMaxQueries + 3 * round_up(count, 16);
    return static_cast<std::size_t>(halves) * sizeof(std::int16_t) + static_cast<std::size_t>(floats) * sizeof(float);
  }

  static constexpr std::int64_t kValueSlack = 32;  // a second vector may be read where only one is there
};

template <class E>
class CodedSpan : BlockSpan<E> {
  using Base = BlockSpan<E>;

 public:
  CodedSpan(const AttentionArgs& a, const AttentionBlock& b, std::int64_t begin, std::int64_t end, std::byte* scratch,
            std::byte* state)
      : Base(a, b, begin, end, CodedWorkspace(scratch, b.rows * a.group, a.head_dim).ranges, state),
        w_(scratch, count_, a.head_dim) {}

  void run() {
    state_.clear(count_);
    if (begin_ >= end_) return;
    const std::int64_t tiles = (count_ + kTileRows - 1) / kTileRows;
    for (std::int64_t at = begin_ / kChunk * kChunk; at < end_; at += kChunk) {
      set_ranges(at);
      wild_ = 0;
      for (int p = 0; p < kPages; ++p) {
        const std::int64_t entry = at + p * kPageTokens;
        if (entry + kPageTokens <= begin_ || entry >= end_) continue;
        code_keys(page(entry), p);
        code_values(page(entry) + values_at_, p);
      }
      PagesAhead next = this->pages_ahead(at + kChunk);
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
      for (std::int64_t d = 0; d < depth; d += 2, to += 2 * kChunk) {
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
      wild_ |= static_cast<std::uint32_t>(_mm256_movemask_ps(wild)) << entry;
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
    for (int p = 0; p < vecs; p += 2)
      kPairScores[rows - 1](w_.queries + begin * kCodeStride, w_.query_scales + begin, w_.keys + 2 * p * kWidth,
                            w_.key_scales + p * kWidth, a_.head_dim, w_.scores + p * kWidth);
    weigh_codes(begin, rows);
    float* const out = state_.sums + begin * state_.stride;
    const std::int64_t pairs = vecs * kWidth / 2;
    std::int64_t d = 0;
    for (; d + 2 * kWidth <= a_.head_dim; d += 2 * kWidth)
      kPairValues<2>[rows - 1](w_.weights, w_.weight_scales, w_.factors, w_.values + 2 * d, pairs, out + d,
                               state_.stride);
    if (d < a_.head_dim)
      kPairValues<1>[rows - 1](w_.weights, w_.weight_scales, w_.factors, w_.values + 2 * d, pairs, out + d,
                               state_.stride);
  }

  // Turns the scores of a tile into weights, updates tops and totals, and codes weights times the scales of the values
  // by what is largest among them. All queries take each step together: none waits for the end of its own chain.
  void weigh_codes(std::int64_t begin, int rows) const {
    alignas(32) float drops[kWidth], inverse[kWidth];
    VecF most[kWidth] = {};
    for (int r = 0; r < rows; ++r) {
      VecF x[kVecs];
      load_scores(w_.scores + r * kChunk, ranges_[begin + r], x);
      most[r] = max(max(x[0], x[1]), max(x[2], x[3]));
    }
    const __m256i some = first_lanes(rows);
    const VecF before = _mm256_maskload_ps(state_.tops + begin, some);
    const VecF tops = max(reduce_max_each(most), before);
    _mm256_maskstore_ps(state_.tops + begin, some, tops);
    const VecF drop = exp2_down(sub(before, tops));
    store_f32(drops, drop);
    store_f32(w_.factors, drop);
    for (int r = 0; r < rows; ++r) most[r] = weigh_row(begin + r, r, drops[r]);
    const VecF top = reduce_max_each(most);
    const VecF used = _mm256_cmp_ps(top, set1(kLeastCoded), _CMP_GE_OQ);
    store_f32(inverse, _mm256_and_ps(used, div(set1(kWeightTop), top)));
    store_f32(w_.weight_scales, _mm256_and_ps(used, mul(top, set1(1.0f / kWeightTop))));
    for (int r = 0; r < rows; ++r) code_row(r, set1(inverse[r]));
  }

  // Weights of one query times the scales of the values, in place of its scores; returns the largest of each lane.
  VecF weigh_row(std::int64_t query, int r, float drop) const {
    const Range& range = ranges_[query];
    float* const row = w_.scores + r * kChunk;
    float* const totals = state_.totals + query * kWidth;
    VecF x[kVecs], total[kVecs];
    load_scores(row, range, x);
    const VecF top = set1(state_.tops[query]);
    unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA {
      total[p] = exp2_coded(sub(x[p], top));
      x[p] = mul(total[p], load_f32(w_.value_scales + p * kWidth));
    });
    // Scales of entries that nothing was stored in are any numbers.
    if (!range.all())
      for (int p = 0; p < kVecs; ++p)
        x[p] = keep_lanes(x[p], range.begin - p * kWidth, range.end - p * kWidth, set1(0.0f));
    unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA { store_f32(row + p * kWidth, x[p]); });
    const VecF sum = add(add(total[0], total[1]), add(total[2], total[3]));
    store_f32(totals, multiply_add(load_f32(totals), set1(drop), sum));
    if (wild_ != 0) spoil(query, range);
    return max(max(x[0], x[1]), max(x[2], x[3]));
  }

  void code_row(int r, VecF inverse) const {
    const float* const row = w_.scores + r * kChunk;
    auto* const to = reinterpret_cast<__m256i*>(w_.weights + r * kChunk);
    unroll<kVecs / 2>([&](auto p) QTALE_INLINE_LAMBDA {
      const __m256i low = _mm256_cvtps_epi32(mul(load_f32(row + 2 * p * kWidth), inverse));
      const __m256i high = _mm256_cvtps_epi32(mul(load_f32(row + (2 * p + 1) * kWidth), inverse));
      _mm256_store_si256(to + p, _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8));
    });
  }

  // A query that sees values which are not finite has no result.
  void spoil(std::int64_t query, const Range& range) const {
    const std::uint64_t seen = (std::uint64_t{1} << range.end) - (std::uint64_t{1} << range.begin);
    if ((seen & wild_) != 0) state_.totals[query * kWidth] = std::numeric_limits<float>::quiet_NaN();
  }

  using Base::a_, Base::begin_, Base::end_, Base::count_, Base::ranges_, Base::state_;
  using Base::page, Base::set_ranges, Base::values_at_, Base::vectors_seen;

  CodedWorkspace w_;
  std::uint32_t wild_ = 0;  // one bit for each entry of the chunk whose values are not all finite
};
static_assert(kChunk == 32);

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
    kQueries, state_bytes, coded_scratch_bytes, prepare_coded, run_coded<TileRows, TileVecs>, merge, finish,
};

}  // namespace
}  // namespace qtale::cpu::attending

// int8 qmatmul on AVX2. Codes of up to 4 bits stay unsigned: products with signed bytes fit 16 bits, and their sums may
// wrap, because lanes start at minus the code offset times their activations and a flush ends before |sum| > 32767.
#pragma once

#include "cpu/matmul_avx2_acts.inl"
#include "cpu/matmul_avx2_codes.inl"

namespace qtale::cpu {
namespace {

template <class C, int T, int S, int Field, int Row = 0>
QTALE_INLINE void multiply_rows(__m256i (&acc)[S][T][2], int s, __m256i w0, __m256i w1, const RowPointers& rows) {
  multiply_add<C::kWide, Row, 4 * Field>(acc[s][Row][0], acc[s][Row][1], w0, w1, rows);
  if constexpr (Row + 1 < T) multiply_rows<C, T, S, Field, Row + 1>(acc, s, w0, w1, rows);
}

// Fields of one step of stream s, from the one that comes at place `At` on.
template <class C, int T, int S, bool Keep, int At = 0>
QTALE_INLINE void multiply_fields(__m256i (&acc)[S][T][2], int s, const std::uint8_t* w, const RowPointers& rows,
                                  std::uint8_t* kept) {
  constexpr bool kFull = T * S > 4;
  constexpr int kField = C::field(At);
  // Hides that fields share lines: keeping those in registers would push sums out.
  if constexpr (kFull) asm volatile("" : "+r"(w));
  const __m256i w0 = C::template get<kField, kFull>(w, 0), w1 = C::template get<kField, kFull>(w, 1);
  if constexpr (Keep) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(kept + 64 * kField), w0);
    _mm256_store_si256(reinterpret_cast<__m256i*>(kept + 64 * kField + 32), w1);
  }
  multiply_rows<C, T, S, kField>(acc, s, w0, w1, rows);
  if constexpr (At + 1 < C::kFields) multiply_fields<C, T, S, Keep, At + 1>(acc, s, w, rows, kept);
}

// Inputs that one set of accumulators covers, and where they lie.
struct Flush {
  const std::uint8_t* params;  // scales of the block
  std::int64_t index;          // which flush of an activation row
  std::int64_t group;          // which activation group
  bool first, last;            // of its activation group
};

// Adds one flush to the part of its activation group, or, where that ends, to the outputs.
template <bool Wide, int T, int S, bool First, bool Last, bool Zeros>
QTALE_INLINE void end_flush(const Tile<Int8Acts>& t, const Flush& f, __m256i (&acc)[S][T][2]) {
  const Layout& l = *t.layout;
  const float* sums = t.acts->sums + f.index * t.acts->rows + t.row;
  const float* input_scales = t.acts->scales + f.group * t.acts->rows + t.row;
  QTALE_UNROLL for (int s = 0; s < S; ++s) QTALE_UNROLL for (int half = 0; half < 2; ++half) {
    const std::uint8_t* params = f.params + s * t.stream;
    const __m256 scale = l.per_channel ? set1(1.0f) : load_scales(params, l.scale_dtype, half);
    const __m256 zeros = Zeros ? load_zeros(params + l.scale_bytes, half) : _mm256_setzero_ps();
    QTALE_UNROLL for (int m = 0; m < T; ++m) {
      const __m256i sum = Wide ? _mm256_srai_epi32(acc[s][m][half], 8)
                               : _mm256_madd_epi16(acc[s][m][half], _mm256_set1_epi16(1));
      __m256 value = _mm256_cvtepi32_ps(sum);
      if constexpr (Zeros) value = _mm256_fnmadd_ps(zeros, _mm256_broadcast_ss(sums + m), value);
      const int at = (s * T + m) * kRows + 8 * half;
      value = First ? _mm256_mul_ps(value, scale) : _mm256_fmadd_ps(value, scale, _mm256_load_ps(t.part + at));
      if constexpr (Last)
        value = _mm256_fmadd_ps(value, _mm256_broadcast_ss(input_scales + m), _mm256_load_ps(t.out + at));
      _mm256_store_ps((Last ? t.out : t.part) + at, value);
    }
  }
}

template <bool Wide, int T, int S, bool Zeros>
QTALE_INLINE void end_flush(const Tile<Int8Acts>& t, const Flush& f, __m256i (&acc)[S][T][2]) {
  if (f.first)
    f.last ? end_flush<Wide, T, S, true, true, Zeros>(t, f, acc) : end_flush<Wide, T, S, true, false, Zeros>(t, f, acc);
  else
    f.last ? end_flush<Wide, T, S, false, true, Zeros>(t, f, acc)
           : end_flush<Wide, T, S, false, false, Zeros>(t, f, acc);
}

template <class C, int T, int S, bool Keep>
QTALE_INLINE void multiply_flush(const Tile<Int8Acts>& t, const Flush& f, const std::uint8_t* w, std::int64_t steps,
                                 RowPointers rows, std::uint8_t* kept) {
  const std::int32_t* starts = t.acts->starts + f.index * t.acts->rows + t.row;
  __m256i acc[S][T][2];
  QTALE_UNROLL for (int m = 0; m < T; ++m) {
    const __m256i start = _mm256_set1_epi32(starts[m]);
    QTALE_UNROLL for (int s = 0; s < S; ++s) acc[s][m][0] = acc[s][m][1] = start;
  }
#pragma GCC unroll 1
  for (; steps > 0; --steps) {
    if constexpr (!C::kKept) prefetch_lines<C::kBytes / 64, S>(w, t.stream);
    QTALE_UNROLL for (int s = 0; s < S; ++s) multiply_fields<C, T, S, Keep>(acc, s, w + s * t.stream, rows, kept);
    w += C::kBytes;
    rows.first += 4 * C::kFields;
    rows.fourth += 4 * C::kFields;
    if constexpr (Keep) kept += 64 * C::kFields;
  }
  // Keeps the loads of scales and sums out of the loop, where every register is taken.
  asm volatile("" ::: "memory");
  if (t.layout->symmetric)
    end_flush<C::kWide, T, S, false>(t, f, acc);
  else
    end_flush<C::kWide, T, S, true>(t, f, acc);
}

template <class C, int T, int S, bool Keep>
__attribute__((noipa)) void tile_int8(const Tile<Int8Acts>& t) {
  const Layout& l = *t.layout;
  const Int8Acts& acts = *t.acts;
  const std::byte* row = acts.codes + t.row * acts.stride;
  for (std::int64_t b = t.begin; b < t.end; ++b) {
    const std::int64_t start = b * l.block_k, size = l.block_size(b);
    std::uint8_t* kept = t.kept + (Keep || C::kKept ? (b - t.begin) * l.block_k * kept_bytes(C::kWide) : 0);
    const std::uint8_t* w = C::kKept ? kept : t.panel + l.block_offset(b);
    for (std::int64_t k = start; k < start + size; k += acts.flush) {
      const std::int64_t count = min64(acts.flush, start + size - k), end = k + count;
      const Flush f{t.panel + l.param_offset(b), k / acts.flush, k / kActGroup, k % kActGroup == 0,
                    end % kActGroup == 0 || end == l.k_padded};
      const std::byte* a = row + (C::kWide ? 2 : 1) * k;
      multiply_flush<C, T, S, Keep>(t, f, w, count / C::kInputs, {a, a + 3 * acts.stride, acts.stride}, kept);
      w += count / C::kInputs * C::kBytes;
      if constexpr (Keep) kept += count * kept_bytes(C::kWide);
    }
  }
}

template <int Bits>
TileFn<Int8Acts> direct_int8(std::int64_t rows, int streams) {
  using C = Codes<Bits>;
  static constexpr TileFn<Int8Acts> kSingle[kTile] = {tile_int8<C, 1, 1, false>, tile_int8<C, 2, 1, false>,
                                                      tile_int8<C, 3, 1, false>, tile_int8<C, 4, 1, false>,
                                                      tile_int8<C, 5, 1, false>, tile_int8<C, 6, 1, false>};
  static constexpr TileFn<Int8Acts> kStreams[3] = {tile_int8<C, 1, 4, false>, tile_int8<C, 2, 2, false>,
                                                   tile_int8<C, 3, 2, false>};
  return streams == 1 ? kSingle[rows - 1] : kStreams[rows - 1];
}

// Only products of seven and more rows keep codes: their first tile has four to six rows, the others three to six.
template <int Bits>
TileFn<Int8Acts> keep_int8(std::int64_t rows) {
  using C = Codes<Bits>;
  static constexpr TileFn<Int8Acts> kTiles[3] = {tile_int8<C, 4, 1, true>, tile_int8<C, 5, 1, true>,
                                                 tile_int8<C, 6, 1, true>};
  return kTiles[rows - 4];
}
template <bool Wide>
TileFn<Int8Acts> kept_int8(std::int64_t rows) {
  using C = KeptCodes<Wide>;
  static constexpr TileFn<Int8Acts> kTiles[4] = {tile_int8<C, 3, 1, false>, tile_int8<C, 4, 1, false>,
                                                 tile_int8<C, 5, 1, false>, tile_int8<C, 6, 1, false>};
  return kTiles[rows - 3];
}

struct Int8Mode {
  using Acts = Int8Acts;
  static TileFn<Acts> direct(int bits, std::int64_t rows, int streams) {
    return bits == 2   ? direct_int8<2>(rows, streams)
           : bits == 3 ? direct_int8<3>(rows, streams)
           : bits == 4 ? direct_int8<4>(rows, streams)
                       : direct_int8<8>(rows, streams);
  }
  static TileFn<Acts> keep(int bits, std::int64_t rows) {
    return bits == 2 ? keep_int8<2>(rows) : bits == 3 ? keep_int8<3>(rows) : bits == 4 ? keep_int8<4>(rows)
                                                                                       : keep_int8<8>(rows);
  }
  static TileFn<Acts> kept(int bits, std::int64_t rows) {
    return bits == 8 ? kept_int8<true>(rows) : kept_int8<false>(rows);
  }
  // Inputs whose unpacked codes fill Frame::kept.
  static std::int64_t stretch(int bits) { return kKeptBytes / kept_bytes(bits == 8); }
};

}  // namespace
}  // namespace qtale::cpu

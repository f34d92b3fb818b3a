// Float qmatmul on AVX2: one mask, one conversion and one FMA for eight weights (see matmul_avx2_float_acts.inl).
#pragma once

#include "cpu/matmul_avx2_codes.inl"
#include "cpu/matmul_avx2_float_acts.inl"

namespace qtale::cpu {
namespace {

// The bits of a lane up to the end of each field, for the lines that differ.
template <int Bits>
struct FieldMasks {
  static constexpr int kLineKinds = Bits == 3 ? 3 : 1;
  alignas(32) std::uint32_t bits[kLineKinds][16][8] = {};

  constexpr FieldMasks() {
    for (int line = 0; line < kLineKinds; ++line)
      for (int i = 0; i + 1 < fields_of<Bits>(line); ++i)
        for (int lane = 0; lane < 8; ++lane)
          bits[line][i][lane] = (std::uint32_t{1} << field_of<Bits>(line, i + 1).start) - 1;
  }
};
template <int Bits>
constexpr FieldMasks<Bits> kFieldMasks;

// How the float tiles walk a panel: 3-bit codes in steps of three lines, others line by line.
template <int Bits>
struct FloatStep {
  static constexpr int kStepLines = Bits == 3 ? 3 : 1;
  static constexpr int kInputs = 32 * kStepLines / kLines<Bits>;
  static constexpr int kFields = kCoefficients<Bits> * kStepLines / kLines<Bits>;
  static constexpr int first_field(int line) { return line * 12; }
};

// v0, v1: the values of one field in panel rows 0-7 and 8-15. One statement, because compilers load constants early and
// convert late when they may, and spill the sums. Signed bytes get 128 added.
template <int Bits, int Line, int Index>
QTALE_INLINE void lane_values(const std::uint8_t* w, __m256& v0, __m256& v1) {
  const auto& codes = *reinterpret_cast<const std::uint8_t(*)[64]>(w);
  const auto& mask = kFieldMasks<Bits>.bits[Line][Index];
  constexpr bool kLast = Index + 1 == fields_of<Bits>(Line);
  if constexpr (Bits == 8) {
    asm volatile("vmovdqa %[flip], %[v1]\n\tvpxor %[w], %[v1], %[v0]\n\tvpxor 32+%[w], %[v1], %[v1]"
                 : [v0] "=&x"(v0), [v1] "=&x"(v1)
                 : [w] "m"(codes), [flip] "m"(kWords<0x80808080>.lanes));
    if constexpr (kLast)
      asm volatile("vpsrld $1, %[v0], %[v0]\n\tvpsrld $1, %[v1], %[v1]" : [v0] "+x"(v0), [v1] "+x"(v1));
    else
      asm volatile("vpand %[mask], %[v0], %[v0]\n\tvpand %[mask], %[v1], %[v1]"
                   : [v0] "+x"(v0), [v1] "+x"(v1)
                   : [mask] "m"(mask));
  } else if constexpr (kLast) {
    asm volatile("vmovdqu %[w], %[v0]\n\tvmovdqu 32+%[w], %[v1]\n\tvpsrld $1, %[v0], %[v0]\n\tvpsrld $1, %[v1], %[v1]"
                 : [v0] "=&x"(v0), [v1] "=&x"(v1)
                 : [w] "m"(codes));
  } else {
    asm volatile("vmovdqa %[mask], %[v1]\n\tvpand %[w], %[v1], %[v0]\n\tvpand 32+%[w], %[v1], %[v1]"
                 : [v0] "=&x"(v0), [v1] "=&x"(v1)
                 : [w] "m"(codes), [mask] "m"(mask));
  }
  asm volatile("vcvtdq2ps %[v0], %[v0]\n\tvcvtdq2ps %[v1], %[v1]" : [v0] "+x"(v0), [v1] "+x"(v1));
}

// As in multiply_add, one statement keeps the broadcasts next to their products.
#define QTALE_FMA(ADDRESS)                                                                                     \
  asm volatile("vbroadcastss %c[offset]" ADDRESS ", %[b]\n\tvfmadd231ps %[b], %[v0], %[c0]\n\tvfmadd231ps "    \
               "%[b], %[v1], %[c1]"                                                                            \
               : [c0] "+x"(c0), [c1] "+x"(c1), [b] "=&x"(b)                                                    \
               : [v0] "x"(v0), [v1] "x"(v1), [a] "r"(rows.first), [d] "r"(rows.fourth), [s] "r"(rows.stride),  \
                 [offset] "i"(Offset))

// c0, c1 += v0, v1 times the coefficient of tile row `Row` at byte `Offset`.
template <int Row, int Offset>
QTALE_INLINE void multiply_add(__m256& c0, __m256& c1, __m256 v0, __m256 v1, const RowPointers& rows) {
  __m256 b;
  if constexpr (Row == 0) QTALE_FMA("(%[a])");
  if constexpr (Row == 1) QTALE_FMA("(%[a],%[s])");
  if constexpr (Row == 2) QTALE_FMA("(%[a],%[s],2)");
  if constexpr (Row == 3) QTALE_FMA("(%[d])");
  if constexpr (Row == 4) QTALE_FMA("(%[a],%[s],4)");
  if constexpr (Row == 5) QTALE_FMA("(%[d],%[s],2)");
}

#undef QTALE_FMA

template <int T, int S, int Offset, int Row = 0>
QTALE_INLINE void multiply_rows(__m256 (&acc)[S][T][2], int s, __m256 v0, __m256 v1, const RowPointers& rows) {
  multiply_add<Row, Offset>(acc[s][Row][0], acc[s][Row][1], v0, v1, rows);
  if constexpr (Row + 1 < T) multiply_rows<T, S, Offset, Row + 1>(acc, s, v0, v1, rows);
}

// Fewer than eight sums in flight would wait for each other: tiles that have fewer use two sets in turn.
template <int T, int S>
constexpr int kSets = T * S * 2 < 8 ? 2 : 1;

// Fields from `Index` on of one line of one or two streams, for one activation row: codes stay in registers.
template <int Bits, int S, int Line, int Streams, int Index = 0>
QTALE_INLINE void multiply_row(__m256 (&acc)[kSets<1, S>][S][1][2], int s, const __m256i (&lines)[Streams][2],
                               const std::byte* row) {
  constexpr int kAt = FloatStep<Bits>::first_field(Line) + Index;
  constexpr bool kLast = Index + 1 == fields_of<Bits>(Line);
  __m256i mask;
  __m256 x;
  asm volatile("vmovdqa %1, %0" : "=x"(mask) : "m"(kFieldMasks<Bits>.bits[Line][Index]));
  asm volatile("vbroadcastss %1, %0" : "=x"(x) : "m"(reinterpret_cast<const float*>(row)[kAt]));
  QTALE_UNROLL for (int i = 0; i < Streams; ++i) QTALE_UNROLL for (int half = 0; half < 2; ++half) {
    const __m256i lane = kLast ? _mm256_srli_epi32(lines[i][half], 1) : _mm256_and_si256(lines[i][half], mask);
    __m256& sum = acc[kAt % kSets<1, S>][s + i][0][half];
    sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(lane), x, sum);
  }
  if constexpr (!kLast) multiply_row<Bits, S, Line, Streams, Index + 1>(acc, s, lines, row);
}

template <int Bits, int S, int Line = 0>
QTALE_INLINE void multiply_row(__m256 (&acc)[kSets<1, S>][S][1][2], const std::uint8_t* w, std::int64_t stream,
                               const std::byte* row) {
  constexpr int kStreams = S == 1 ? 1 : 2;
  QTALE_UNROLL for (int s = 0; s < S; s += kStreams) {
    __m256i lines[kStreams][2];
    QTALE_UNROLL for (int i = 0; i < kStreams; ++i) QTALE_UNROLL for (int half = 0; half < 2; ++half) {
      lines[i][half] = load_line(w + (s + i) * stream + 64 * Line + 32 * half);
      if constexpr (Bits == 8)
        asm volatile("vpxor %1, %0, %0" : "+x"(lines[i][half]) : "m"(kWords<0x80808080>.lanes));
    }
    multiply_row<Bits, S, Line, kStreams>(acc, s, lines, row);
  }
  if constexpr (Line + 1 < FloatStep<Bits>::kStepLines) multiply_row<Bits, S, Line + 1>(acc, w, stream, row);
}

// Fields from (Line, Index) on of one step.
template <int Bits, int T, int S, int Line = 0, int Index = 0>
QTALE_INLINE void multiply_fields(__m256 (&acc)[kSets<T, S>][S][T][2], const std::uint8_t* w, std::int64_t stream,
                                  const RowPointers& rows) {
  constexpr int kAt = FloatStep<Bits>::first_field(Line) + Index;
  QTALE_UNROLL for (int s = 0; s < S; ++s) {
    __m256 v0, v1;
    lane_values<Bits, Line, Index>(w + s * stream + 64 * Line, v0, v1);
    multiply_rows<T, S, 4 * kAt>(acc[kAt % kSets<T, S>], s, v0, v1, rows);
  }
  if constexpr (Index + 1 < fields_of<Bits>(Line)) {
    multiply_fields<Bits, T, S, Line, Index + 1>(acc, w, stream, rows);
  } else if constexpr (Line + 1 < FloatStep<Bits>::kStepLines) {
    multiply_fields<Bits, T, S, Line + 1, 0>(acc, w, stream, rows);
  }
}

template <int Bits, int T, int S>
QTALE_INLINE void add_to_out(const Tile<FloatActs>& t, std::int64_t b, __m256 (&acc)[kSets<T, S>][S][T][2]) {
  const Layout& l = *t.layout;
  const float* sums = t.acts->sums + t.row * t.acts->blocks + b;
  QTALE_UNROLL for (int s = 0; s < S; ++s) QTALE_UNROLL for (int half = 0; half < 2; ++half) {
    const std::uint8_t* params = t.panel + l.param_offset(b) + s * t.stream;
    const __m256 scale = l.per_channel ? set1(1.0f) : load_scales(params, l.scale_dtype, half);
    __m256 zeros = set1(static_cast<float>(1 << (Bits - 1)));
    if (!l.symmetric) zeros = add(zeros, load_zeros(params + l.scale_bytes, half));
    QTALE_UNROLL for (int m = 0; m < T; ++m) {
      __m256 value = acc[0][s][m][half];
      if constexpr (kSets<T, S> == 2) value = add(value, acc[1][s][m][half]);
      value = _mm256_fnmadd_ps(zeros, _mm256_broadcast_ss(sums + m * t.acts->blocks), value);
      float* out = t.out + (s * T + m) * kRows + 8 * half;
      _mm256_store_ps(out, _mm256_fmadd_ps(value, scale, _mm256_load_ps(out)));
    }
  }
}

template <int Bits, int T, int S>
__attribute__((noipa)) void tile_float(const Tile<FloatActs>& t) {
  using Step = FloatStep<Bits>;
  const Layout& l = *t.layout;
  const std::int64_t stride = t.acts->stride;
  for (std::int64_t b = t.begin; b < t.end; ++b) {
    const std::uint8_t* w = t.panel + l.block_offset(b);
    const std::byte* a = t.acts->values + t.row * stride + b * l.block_k * (4 * Step::kFields / Step::kInputs);
    RowPointers rows{a, a + 3 * stride, stride};
    __m256 acc[kSets<T, S>][S][T][2];
    QTALE_UNROLL for (int i = 0; i < kSets<T, S>; ++i) QTALE_UNROLL for (int s = 0; s < S; ++s)
      QTALE_UNROLL for (int m = 0; m < T; ++m) acc[i][s][m][0] = acc[i][s][m][1] = _mm256_setzero_ps();
#pragma GCC unroll 1
    for (std::int64_t steps = l.block_size(b) / Step::kInputs; steps > 0; --steps) {
      prefetch_lines<Step::kStepLines, S>(w, t.stream);
      if constexpr (T == 1)
        multiply_row<Bits, S>(acc, w, t.stream, rows.first);
      else
        multiply_fields<Bits, T, S>(acc, w, t.stream, rows);
      w += 64 * Step::kStepLines;
      rows.first += 4 * Step::kFields;
      rows.fourth += 4 * Step::kFields;
    }
    asm volatile("" ::: "memory");
    add_to_out<Bits, T, S>(t, b, acc);
  }
}

template <int Bits>
TileFn<FloatActs> pick_float(std::int64_t rows, int streams) {
  static constexpr TileFn<FloatActs> kSingle[kTile] = {tile_float<Bits, 1, 1>, tile_float<Bits, 2, 1>,
                                                       tile_float<Bits, 3, 1>, tile_float<Bits, 4, 1>,
                                                       tile_float<Bits, 5, 1>, tile_float<Bits, 6, 1>};
  static constexpr TileFn<FloatActs> kStreams[3] = {tile_float<Bits, 1, 4>, tile_float<Bits, 2, 2>,
                                                    tile_float<Bits, 3, 2>};
  return streams == 1 ? kSingle[rows - 1] : kStreams[rows - 1];
}

// Conversion hides behind the FMAs, so nothing is worth keeping.
struct FloatMode {
  using Acts = FloatActs;
  static TileFn<Acts> direct(int bits, std::int64_t rows, int streams) {
    return bits == 2   ? pick_float<2>(rows, streams)
           : bits == 3 ? pick_float<3>(rows, streams)
           : bits == 4 ? pick_float<4>(rows, streams)
                       : pick_float<8>(rows, streams);
  }
  static TileFn<Acts> keep(int bits, std::int64_t rows) { return direct(bits, rows, 1); }
  static TileFn<Acts> kept(int bits, std::int64_t rows) { return direct(bits, rows, 1); }
  static std::int64_t stretch(int) { return 512; }
};

}  // namespace
}  // namespace qtale::cpu

// One set of accumulators of an AVX2 tile, a flush: it starts, takes the products of its inputs, and is added to what
// came before.
#pragma once

#include "cpu/matmul_avx2_codes.inl"

namespace qtale::cpu {
namespace {

// Some rows times blocks [begin, end) of one panel, or of several panels `stream` bytes apart. Sums are added
// to out [streams][rows][16]; part, as large, holds those of an unfinished activation group.
struct Tile {
  const Layout* layout;
  const Acts* acts;
  std::int64_t tile, lane;  // of packed rows the tile and the place in it where they begin; of others lane is the row
  const std::uint8_t* panel;
  std::int64_t stream;
  std::int64_t begin, end;
  std::uint8_t* kept;         // unpacked codes of the blocks and
  float* kept_scales;         // [blocks][16] their scales, for the other tiles of the same panel
  const std::uint8_t* ahead;  // what tiles that read kept codes prefetch,
  std::int64_t ahead_step;    // and how far that goes on for every 128 bytes of kept codes
  float* part;
  float* out;
  __m256i (*seventh)[2];  // sums of the seventh row: those of even fields, those of odd ones
};

using TileFn = void (*)(const Tile&);

// Where a tile is: everything moves on from flush to flush, a flush being the inputs of one set of accumulators.
struct Place {
  const std::uint8_t* codes;
  std::uint8_t* kept;
  const std::uint8_t* ahead;
  const std::uint8_t* params;  // scales and zero points of the block
  float* kept_scales;
  RowPointers rows;
  const std::int32_t* starts;
  const float* sums;
  const float* input_scales;
  std::int64_t in_group;  // inputs of the activation group so far
};

// Scales of a panel's rows.
QTALE_INLINE void load_scales(const std::uint8_t* p, DType dtype, __m256 (&scales)[2]) {
  if (dtype == DType::f16) {
    scales[0] = load_f16(reinterpret_cast<const std::uint16_t*>(p));
    scales[1] = load_f16(reinterpret_cast<const std::uint16_t*>(p) + 8);
  } else if (dtype == DType::bf16) {
    scales[0] = load_bf16(reinterpret_cast<const std::uint16_t*>(p));
    scales[1] = load_bf16(reinterpret_cast<const std::uint16_t*>(p) + 8);
  } else {
    scales[0] = load_f32(reinterpret_cast<const float*>(p));
    scales[1] = load_f32(reinterpret_cast<const float*>(p) + 8);
  }
}

template <class C, int T, int S, bool Packed, int Field, int Row = 0>
QTALE_INLINE void multiply_rows(__m256i (&acc)[S][T][2], int s, __m256i w0, __m256i w1, const RowPointers& rows,
                                __m256i (*seventh)[2]) {
  multiply_add<C::kWide, Packed, Row, Field>(acc[s][Row][0], acc[s][Row][1], w0, w1, rows);
  // In two copies, because a sum takes long from its store to its next load.
  if constexpr (T > kTile && Row == 2) multiply_add_seventh<4 * Field>(seventh[Field % 2], w0, w1, rows);
  if constexpr (Row + 1 < T && Row + 1 < kTile)
    multiply_rows<C, T, S, Packed, Field, Row + 1>(acc, s, w0, w1, rows, seventh);
}

// Fields of one step of stream s, from the one that comes at place `At` on.
template <class C, int T, int S, bool Keep, int At = 0>
QTALE_INLINE void multiply_fields(__m256i (&acc)[S][T][2], int s, const std::uint8_t* w, const RowPointers& rows,
                                  std::uint8_t* kept, __m256i (*seventh)[2]) {
  constexpr bool kFull = T * S > 4;
  constexpr int kField = C::field(At);
  // Hides that fields share lines: keeping those in registers would push sums out.
  if constexpr (kFull) asm volatile("" : "+r"(w));
  const __m256i w0 = C::template get<kField, kFull>(w, 0), w1 = C::template get<kField, kFull>(w, 1);
  if constexpr (Keep) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(kept + 64 * kField), w0);
    _mm256_store_si256(reinterpret_cast<__m256i*>(kept + 64 * kField + 32), w1);
  }
  multiply_rows<C, T, S, C::kKept || Keep, kField>(acc, s, w0, w1, rows, seventh);
  if constexpr (At + 1 < C::kFields) multiply_fields<C, T, S, Keep, At + 1>(acc, s, w, rows, kept, seventh);
}

// Keeps the scales of a block in float32 while no sums are held: their type is a decision, which compilers make room
// for by spilling sums.
template <class C, int S>
QTALE_INLINE void keep_scales(const Tile& t, const Layout& l, const Place& at) {
  if constexpr (C::kKept) return;
  QTALE_UNROLL
  for (int s = 0; s < S; ++s) {
    __m256 scales[2] = {set1(1.0f), set1(1.0f)};
    if (!l.per_channel) load_scales(at.params + s * t.stream, l.scale_dtype, scales);
    _mm256_store_ps(at.kept_scales + s * kRows, scales[0]);
    _mm256_store_ps(at.kept_scales + s * kRows + 8, scales[1]);
  }
}

// Lanes begin at minus the code offset times their activations.
template <int T, int S>
QTALE_INLINE void start_lanes(const Tile& t, const Place& at, __m256i (&acc)[S][T][2]) {
  QTALE_UNROLL
  for (int m = 0; m < T; ++m) {
    const __m256i start = _mm256_set1_epi32(at.starts[m]);
    QTALE_UNROLL
    for (int s = 0; s < S; ++s) acc[s][m][0] = acc[s][m][1] = start;
  }
  if constexpr (T > kTile) {
    t.seventh[0][0] = t.seventh[0][1] = acc[0][kTile][0];
    t.seventh[1][0] = t.seventh[1][1] = _mm256_setzero_si256();
  }
}

template <class C, int T, int S, bool Keep>
QTALE_INLINE void multiply_steps(const Tile& t, Place& at, std::int64_t steps, __m256i (&acc)[S][T][2]) {
#pragma GCC unroll 1
  for (; steps > 0; --steps) {
    if constexpr (C::kKept) {
      _mm_prefetch(reinterpret_cast<const char*>(at.ahead), _MM_HINT_T0);
      at.ahead += t.ahead_step;
    } else {
      prefetch_lines<C::kBytes / 64, S, C::kAhead>(at.codes, t.stream);
    }
    QTALE_UNROLL
    for (int s = 0; s < S; ++s)
      multiply_fields<C, T, S, Keep>(acc, s, at.codes + s * t.stream, at.rows, at.kept, t.seventh);
    at.codes += C::kBytes;
    if constexpr (C::kKept || Keep) {
      at.rows.first += kWord * kTile * C::kFields;
    } else {
      at.rows.first += kWord * C::kFields;
      at.rows.fourth += kWord * C::kFields;
    }
    if constexpr (Keep) at.kept += 64 * C::kFields;
  }
  // Keeps the loads of scales and sums out of the loop, where every register is taken.
  asm volatile("" ::: "memory");
}

// What a flush does with the part of its activation group that came before, and where it goes.
enum class Stage { begin, middle, end, whole, end_joint };
constexpr bool begins(Stage stage) { return stage == Stage::begin || stage == Stage::whole; }
constexpr bool ends(Stage stage) { return stage == Stage::end || stage == Stage::whole || stage == Stage::end_joint; }

// The sums of all lanes, which make no more lanes than a register holds of 32 bits.
template <class C, int T, int S>
QTALE_INLINE __m256i flushed(const Tile& t, __m256i (&acc)[S][T][2], int s, int m, int half) {
  const __m256i lanes = m < kTile ? acc[s][m][half] : _mm256_add_epi16(t.seventh[0][half], t.seventh[1][half]);
  return C::kWide ? lanes : _mm256_madd_epi16(lanes, _mm256_set1_epi16(1));
}

// Keeps the integers of the first flush of a group for the second.
template <class C, int T, int S>
QTALE_INLINE void begin_joint(const Tile& t, __m256i (&acc)[S][T][2]) {
  QTALE_UNROLL
  for (int s = 0; s < S; ++s) QTALE_UNROLL
  for (int m = 0; m < T; ++m) QTALE_UNROLL
  for (int half = 0; half < 2; ++half)
    _mm256_store_si256(reinterpret_cast<__m256i*>(t.part + (s * T + m) * kRows + 8 * half),
                       flushed<C>(t, acc, s, m, half));
}

// Adds one flush to the part of its activation group, or, where that ends, to the outputs.
template <class C, int T, int S, Stage At, bool Zeros>
QTALE_INLINE void add_flush(const Tile& t, const Layout& l, std::int64_t places, const Place& at,
                            __m256i (&acc)[S][T][2]) {
  constexpr bool kJoint = At == Stage::end_joint;
  QTALE_UNROLL
  for (int s = 0; s < S; ++s) {
    const __m256 scales[2] = {_mm256_load_ps(at.kept_scales + s * kRows),
                              _mm256_load_ps(at.kept_scales + s * kRows + 8)};
    const auto* zero_points = reinterpret_cast<const std::int8_t*>(at.params + s * t.stream + l.scale_bytes);
    QTALE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const __m256 zeros = Zeros ? load_s8(zero_points + 8 * half) : _mm256_setzero_ps();
      QTALE_UNROLL
      for (int m = 0; m < T; ++m) {
        const int to = (s * T + m) * kRows + 8 * half;
        __m256i sum = flushed<C>(t, acc, s, m, half);
        if constexpr (kJoint)
          sum = _mm256_add_epi32(sum, _mm256_load_si256(reinterpret_cast<const __m256i*>(t.part + to)));
        __m256 value = _mm256_cvtepi32_ps(sum);
        if constexpr (Zeros) {
          __m256 codes = _mm256_broadcast_ss(at.sums + m);
          if constexpr (kJoint) codes = _mm256_add_ps(codes, _mm256_broadcast_ss(at.sums + m - places));
          value = _mm256_fnmadd_ps(zeros, codes, value);
        }
        value = begins(At) || kJoint ? _mm256_mul_ps(value, scales[half])
                                     : _mm256_fmadd_ps(value, scales[half], _mm256_load_ps(t.part + to));
        if constexpr (ends(At))
          value = _mm256_fmadd_ps(value, _mm256_broadcast_ss(at.input_scales + m), _mm256_load_ps(t.out + to));
        _mm256_store_ps((ends(At) ? t.out : t.part) + to, value);
      }
    }
  }
}

QTALE_INLINE void next_flush(Place& at, std::int64_t places, bool last) {
  at.starts += places;
  at.sums += places;
  if (last) at.input_scales += places;
  // Hides how they move on: compilers would move a pointer for every row.
  asm("" : "+r"(at.starts), "+r"(at.sums), "+r"(at.input_scales));
}

}  // namespace
}  // namespace qtale::cpu

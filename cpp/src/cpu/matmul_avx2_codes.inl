// Codes of 16-row panels as AVX2 multiplies them, and the multiply-add of one activation row.
#pragma once

#include "cpu/matmul_avx2_acts.inl"

namespace qtale::cpu {
namespace {

#define QTALE_UNROLL _Pragma("GCC unroll 16")
#define QTALE_INLINE __attribute__((always_inline)) inline

constexpr int kRows = 16;

QTALE_INLINE __m256i load_line(const std::uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

template <std::uint32_t Value>
struct Words {
  alignas(32) std::uint32_t lanes[8] = {Value, Value, Value, Value, Value, Value, Value, Value};
};
template <std::uint32_t Value>
constexpr Words<Value> kWords;

// v & Value in every 32-bit lane, with the constant in memory: compilers move constants out of loops, and where sums
// take most registers they spill for it.
template <std::uint32_t Value>
QTALE_INLINE __m256i mask_lanes(__m256i v) {
  __m256i masked;
  asm volatile("vpand %2, %1, %0" : "=x"(masked) : "x"(v), "m"(kWords<Value>.lanes));
  return masked;
}

// Bits `Value` of the line at p after a shift to the right. A full tile, one whose sums take all registers that it can
// spare, reads the line anew for each field.
template <bool Full, int Shift, std::uint32_t Value>
QTALE_INLINE __m256i line_bits(const std::uint8_t* p) {
  if constexpr (!Full)
    return _mm256_and_si256(_mm256_srli_epi16(load_line(p), Shift), _mm256_set1_epi32(static_cast<int>(Value)));
  const auto& line = *reinterpret_cast<const std::uint8_t (*)[32]>(p);
  __m256i bits;
  if constexpr (Shift == 0) {
    asm volatile("vmovdqa %2, %0\n\tvpand %1, %0, %0" : "=&x"(bits) : "m"(line), "m"(kWords<Value>.lanes));
  } else {
    asm volatile("vmovdqu %1, %0\n\tvpsrlw %3, %0, %0\n\tvpand %2, %0, %0"
                 : "=&x"(bits)
                 : "m"(line), "m"(kWords<Value>.lanes), "i"(Shift));
  }
  return bits;
}

// A form reads `kInputs` inputs from `kBytes` bytes as `kFields` pairs of registers (panel rows 0-7 and 8-15), each of
// which meets one 32-bit word of an activation row: unsigned bytes meet signed bytes, and in wide forms 16-bit numbers
// meet 16-bit numbers. field() is the order in which fields are taken, kAhead how many bytes ahead of each stream
// memory is asked for, kHalves whether 16-bit lanes may hold no more than half an activation group.
template <int Bits>
struct Codes;

template <>
struct Codes<4> {
  static constexpr int kInputs = 8, kFields = 2, kBytes = 64;
  static constexpr int kAhead = 2048;
  static constexpr bool kWide = false, kKept = false, kHalves = true;
  static constexpr int field(int place) { return place; }
  template <int Field, bool Full>
  static QTALE_INLINE __m256i get(const std::uint8_t* w, int half) {
    return line_bits<Full, 4 * Field, 0x0f0f0f0f>(w + 32 * half);
  }
};

template <>
struct Codes<2> {
  static constexpr int kInputs = 16, kFields = 4, kBytes = 64;
  static constexpr int kAhead = 2048;
  static constexpr bool kWide = false, kKept = false, kHalves = false;
  static constexpr int field(int place) { return place; }
  template <int Field, bool Full>
  static QTALE_INLINE __m256i get(const std::uint8_t* w, int half) {
    return line_bits<Full, 2 * Field, 0x03030303>(w + 32 * half);
  }
};

template <>
struct Codes<3> {
  static constexpr int kInputs = 32, kFields = 8, kBytes = 192;
  static constexpr int kAhead = 2048;
  static constexpr bool kWide = false, kKept = false, kHalves = false;
  // Line 2 first, because the last field of either other line needs its bits.
  static constexpr int field(int place) { return "45016237"[place] - '0'; }
  template <int Field, bool Full>
  static QTALE_INLINE __m256i get(const std::uint8_t* w, int half) {
    constexpr int kLine = Field < 6 ? Field / 2 : Field - 6;
    const std::uint8_t* line = w + 64 * kLine + 32 * half;
    if constexpr (Field < 6) {
      if constexpr (Full) return line_bits<true, Field % 2 * 3, 0x07070707>(line);
      return mask_lanes<0x07070707>(_mm256_srli_epi16(load_line(line), Field % 2 * 3));
    } else {
      const __m256i high = mask_lanes<0x04040404>(_mm256_srli_epi16(load_line(w + 128 + 32 * half), Field - 2));
      return _mm256_or_si256(mask_lanes<0x03030303>(_mm256_srli_epi16(load_line(line), 6)), high);
    }
  }
};

template <>
struct Codes<8> {
  static constexpr int kInputs = 4, kFields = 2, kBytes = 64;
  static constexpr int kAhead = 1024;
  static constexpr bool kWide = true, kKept = false, kHalves = false;
  static constexpr int field(int place) { return place; }
  template <int Field, bool Full>
  static QTALE_INLINE __m256i get(const std::uint8_t* w, int half) {
    const __m256i line = load_line(w + 32 * half);
    return _mm256_srai_epi16(Field == 0 ? _mm256_slli_epi16(line, 8) : line, 8);
  }
};

// What a keeping tile left: the registers of every field, in order.
template <bool Wide>
struct KeptCodes {
  static constexpr int kInputs = Wide ? 4 : 8, kFields = 2, kBytes = 128;
  static constexpr bool kWide = Wide, kKept = true, kHalves = !Wide;
  static constexpr int field(int place) { return place; }
  template <int Field, bool Full>
  static QTALE_INLINE __m256i get(const std::uint8_t* w, int half) {
    return load_line(w + 64 * Field + 32 * half);
  }
};

// Bytes that one input of a panel takes in the kept form.
constexpr int kept_bytes(bool wide) { return wide ? 32 : 16; }

template <int Lines, int S, int Distance>
QTALE_INLINE void prefetch_lines(const std::uint8_t* w, std::int64_t stream) {
  QTALE_UNROLL
  for (int s = 0; s < S; ++s) QTALE_UNROLL
  for (int line = 0; line < Lines; ++line)
    _mm_prefetch(reinterpret_cast<const char*>(w) + s * stream + 64 * line + Distance, _MM_HINT_T0);
}

// Where the rows of a tile begin, packed ones all at `first`. Two registers and a stride reach six rows through the
// addressing modes, the seventh takes another stride.
struct RowPointers {
  const std::byte* first;
  const std::byte* fourth;
  std::int64_t stride;
  std::int64_t three_strides;  // from the fourth row to the seventh
};

// One statement, because compilers load the broadcasts of all rows first when they may, and spill the accumulators.
#define QTALE_MULTIPLY_ADD(MULTIPLY, ADD, ADDRESS)                                                            \
  asm volatile("vpbroadcastd %c[offset]" ADDRESS ", %[b]\n\t" MULTIPLY " %[b], %[w0], %[t]\n\t" MULTIPLY      \
               " %[b], %[w1], %[b]\n\t" ADD " %[t], %[c0], %[c0]\n\t" ADD " %[b], %[c1], %[c1]"               \
               : [c0] "+x"(c0), [c1] "+x"(c1), [b] "=&x"(b), [t] "=&x"(t)                                     \
               : [w0] "x"(w0), [w1] "x"(w1), [a] "r"(rows.first), [d] "r"(rows.fourth), [s] "r"(rows.stride), \
                 [offset] "i"(Offset))
#define QTALE_MULTIPLY_ADD_ROW(MULTIPLY, ADD)                                 \
  if constexpr (Row == 0) QTALE_MULTIPLY_ADD(MULTIPLY, ADD, "(%[a])");        \
  if constexpr (Row == 1) QTALE_MULTIPLY_ADD(MULTIPLY, ADD, "(%[a],%[s])");   \
  if constexpr (Row == 2) QTALE_MULTIPLY_ADD(MULTIPLY, ADD, "(%[a],%[s],2)"); \
  if constexpr (Row == 3) QTALE_MULTIPLY_ADD(MULTIPLY, ADD, "(%[d])");        \
  if constexpr (Row == 4) QTALE_MULTIPLY_ADD(MULTIPLY, ADD, "(%[a],%[s],4)"); \
  if constexpr (Row == 5) QTALE_MULTIPLY_ADD(MULTIPLY, ADD, "(%[d],%[s],2)")

// c0, c1 += w0, w1 times word `Word` of tile row `Row`.
template <bool Wide, bool Packed, int Row, int Word>
QTALE_INLINE void multiply_add(__m256i& c0, __m256i& c1, __m256i w0, __m256i w1, const RowPointers& rows) {
  constexpr int Offset = static_cast<int>(kWord) * (Packed ? kTile * Word + Row : Word);
  __m256i b, t;
  if constexpr (Packed && Wide) {
    QTALE_MULTIPLY_ADD("vpmaddwd", "vpaddd", "(%[a])");
  } else if constexpr (Packed) {
    QTALE_MULTIPLY_ADD("vpmaddubsw", "vpaddw", "(%[a])");
  } else if constexpr (Wide) {
    QTALE_MULTIPLY_ADD_ROW("vpmaddwd", "vpaddd");
  } else {
    QTALE_MULTIPLY_ADD_ROW("vpmaddubsw", "vpaddw");
  }
}

// The same of bytes for the seventh row, whose sums stay in memory.
template <int Offset>
QTALE_INLINE void multiply_add_seventh(__m256i (&c)[2], __m256i w0, __m256i w1, const RowPointers& rows) {
  __m256i b, t;
  asm volatile(
      "vpbroadcastd %c[offset](%[d],%[s3]), %[b]\n\tvpmaddubsw %[b], %[w0], %[t]\n\tvpmaddubsw %[b], %[w1], %[b]\n\t"
      "vpaddw %[c0], %[t], %[t]\n\tvpaddw %[c1], %[b], %[b]\n\tvmovdqa %[t], %[c0]\n\tvmovdqa %[b], %[c1]"
      : [c0] "+m"(c[0]), [c1] "+m"(c[1]), [b] "=&x"(b), [t] "=&x"(t)
      : [w0] "x"(w0), [w1] "x"(w1), [d] "r"(rows.fourth), [s3] "r"(rows.three_strides), [offset] "i"(Offset));
}

#undef QTALE_MULTIPLY_ADD_ROW
#undef QTALE_MULTIPLY_ADD

}  // namespace
}  // namespace qtale::cpu

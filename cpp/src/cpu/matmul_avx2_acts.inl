// Activations as the AVX2 kernels read them: integer codes in rows, one scale per 128 inputs.
// int8 mode has one plane of codes per activation row, int16 mode two, or one of 16 bits for 8-bit weights, which are
// multiplied as such. Float mode has two or three: each later plane codes what the planes before it left over, down to
// 2^-24 of the largest of the 128 inputs, which is what float32 sums resolve.
// Planes are rows of their own to the kernels; their products are added up at the end. Rows that one tile takes lie one
// after the other; more are packed by tiles, whose rows take turns with words of 32 bits, so that a tile is one stream.
#pragma once

#include <immintrin.h>

#include "cpu/activations.inl"

namespace qtale::cpu {
namespace {

constexpr int kTile = 6;  // rows: twelve accumulators leave room for two weights, a broadcast and a product
// Rows that take a panel's codes as they are, in one tile. 8-bit codes, which wait for memory, gain more by being kept.
constexpr int direct_rows(bool wide) { return wide ? kTile : kTile + 1; }
constexpr std::int64_t kEvenRows =
    4 * kTile;                     // so few make tiles of nearly equal size: a thin one costs as much as a full one
constexpr std::int64_t kWord = 4;  // bytes that a multiplication takes of a row of codes

// Bytes from row to row: an odd number of cache lines, so that the rows of a tile do not fall into the same L1 sets.
inline std::int64_t row_stride(std::int64_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

constexpr std::int64_t planes_of(Compute mode) { return mode == Compute::int8 ? 1 : mode == Compute::int16 ? 2 : 3; }

struct Acts {
  float least;             // scale
  float top;               // largest code
  std::int64_t planes;     // rows of codes per activation row
  std::int64_t rows;       // of codes
  std::int64_t flush;      // inputs per set of accumulators: 16-bit lanes hold 64 inputs of 4 bits, 128 of fewer
  std::int64_t flushes;    // per row
  std::int64_t per_block;  // flushes
  std::int64_t groups;     // scales per row
  bool packed;             // by tiles
  std::int64_t width;      // rows of a tile, which are packed in kTile places; all rows where they are not packed
  std::int64_t stride;     // bytes from row to row of codes, or in all of a row's words where they are packed
  std::byte* codes;        // int8; for 8-bit weights int16, and inputs 1 and 2 of every four change places
  std::int32_t* starts;    // [tiles, flushes, places]: what accumulators start at, a pair of 16-bit lanes; 0 for 8 bits
  float* sums;             // [tiles, flushes, places]: sums of the codes
  float* scales;           // [tiles, groups, places]
  std::size_t bytes;

  Acts(const Layout& l, std::int64_t row_count, Compute mode, std::byte* workspace)
      : least(mode == Compute::int8 ? 0.0f : FLT_MIN),
        top(mode != Compute::int8 && l.num_bits == 8 ? 32767.0f : 127.0f),
        planes(planes_of(mode) - (mode != Compute::int8 && l.num_bits == 8)),
        rows(row_count * planes),
        flush(l.num_bits == 4 ? min64(64, l.block_k) : l.block_k),
        flushes((l.k_padded + flush - 1) / flush),
        per_block(l.block_k / flush),
        groups(l.act_groups),
        packed(rows > direct_rows(l.num_bits == 8)),
        width(rows > kEvenRows ? kTile
              : packed         ? next_tile(rows, kTile)
                               : rows) {
    const std::int64_t row_bytes = l.num_bits == 8 ? 2 * l.k_padded : l.k_padded;
    stride = packed ? row_bytes : row_stride(row_bytes);
    const std::int64_t room = packed ? (rows + width - 1) / width * kTile : rows;
    const std::size_t code_bytes = aligned(static_cast<std::size_t>(room * stride));
    const std::size_t flush_bytes = aligned(static_cast<std::size_t>(room * flushes) * sizeof(float));
    codes = workspace;
    starts = reinterpret_cast<std::int32_t*>(workspace + code_bytes);
    sums = reinterpret_cast<float*>(workspace + code_bytes + flush_bytes);
    scales = reinterpret_cast<float*>(workspace + code_bytes + 2 * flush_bytes);
    bytes = code_bytes + 2 * flush_bytes + aligned(static_cast<std::size_t>(room * groups) * sizeof(float));
  }

  std::int64_t places() const { return packed ? kTile : rows; }
  // Where the row in place `lane` of a tile has number `index` of `count`.
  std::int64_t place(std::int64_t tile, std::int64_t lane, std::int64_t index, std::int64_t count) const {
    return (tile * count + index) * places() + lane;
  }
  // The word at byte `offset` of a row's codes.
  std::byte* word(std::int64_t tile, std::int64_t lane, std::int64_t offset) const {
    return packed ? codes + (tile * stride + offset) * kTile + lane * kWord : codes + lane * stride + offset;
  }
  void store(std::int64_t row, std::int64_t offset, const std::byte* from, std::int64_t count) const {
    std::byte* to = word(row / width, row % width, offset);
    if (!packed) {
      std::memcpy(to, from, static_cast<std::size_t>(count));
      return;
    }
    for (std::int64_t i = 0; i < count; i += kWord, to += kTile * kWord) std::memcpy(to, from + i, kWord);
  }
};

template <Compute Mode>
std::size_t acts_bytes(const Layout& l, std::int64_t rows) {
  return Acts(l, rows, Mode, nullptr).bytes;
}

// The 16-bit sums of inputs 4i, 4i + 1 and of inputs 4i + 2, 4i + 3.
inline __m128i sum_lanes(const std::int8_t* codes, std::int64_t count) {
  const __m256i ones = _mm256_set1_epi8(1);
  __m256i sum = _mm256_setzero_si256();
  for (std::int64_t i = 0; i < count; i += 32) {
    const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(ones, line));
  }
  __m128i half = _mm_add_epi16(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  half = _mm_add_epi16(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_add_epi16(half, _mm_shuffle_epi32(half, 0xb1));
}

// Codes x, `count` values a multiple of 32, by a scale and leaves in x what the codes miss. Stores them as int8 or, in
// the order 0, 2, 1, 3 of every four, as int16. Returns their sum where they are int16.
template <bool Wide>
inline float code_plane(float* x, std::int64_t count, float scale, std::byte* codes) {
  const VecF high = set1(Wide ? 32767.0f : 127.0f), low = sub(set1(0.0f), high);
  const VecF step = set1(scale), inverse = set1(scale >= FLT_MIN ? 1.0f / scale : 0.0f);
  VecF sum = set1(0.0f);
  for (std::int64_t i = 0; i < count; i += kWidth) {
    const VecF value = load_f32(x + i);
    const VecF code = min(high, max(low, rint(mul(value, inverse))));
    store_f32(x + i, _mm256_fnmadd_ps(code, step, value));
    if constexpr (Wide) {
      const __m256i wide = _mm256_cvtps_epi32(_mm256_permute_ps(code, 0xd8));
      const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 2 * i), narrow);
      sum = add(sum, code);
    } else {
      store_s8(reinterpret_cast<std::int8_t*>(codes + i), code);
    }
  }
  return Wide ? reduce_add(sum) : 0.0f;
}

// Planes of one activation group of row `row`: x [padded], zeros behind the inputs. NaN or inf make every scale NaN.
template <bool Wide>
void code_group(const Acts& out, std::int64_t row, std::int64_t group, float amax, __m128i offset, float* x,
                std::int64_t padded) {
  constexpr std::int64_t kBytes = Wide ? 2 : 1;
  alignas(32) std::byte codes[kBytes * kActGroup];
  const bool finite = amax <= FLT_MAX;
  float scale = finite ? amax / out.top : 0.0f;
  for (std::int64_t r = row; r < row + out.planes; ++r, scale /= 2.0f * out.top) {
    if (scale < out.least) scale = out.least;
    for (std::int64_t i = 0; i < padded; i += out.flush) {
      const std::int64_t count = min64(out.flush, padded - i), k = group * kActGroup + i;
      const std::int64_t at = out.place(r / out.width, r % out.width, k / out.flush, out.flushes);
      const float sum = code_plane<Wide>(x + i, count, scale, codes);
      out.store(r, kBytes * k, codes, kBytes * count);
      if constexpr (Wide) {
        out.starts[at] = 0;
        out.sums[at] = sum;
      } else {
        const __m128i lanes = sum_lanes(reinterpret_cast<const std::int8_t*>(codes), count);
        out.starts[at] = _mm_cvtsi128_si32(_mm_mullo_epi16(lanes, offset));
        out.sums[at] = static_cast<float>(_mm_cvtsi128_si32(_mm_madd_epi16(lanes, _mm_set1_epi16(1))));
      }
    }
    out.scales[out.place(r / out.width, r % out.width, group, out.groups)] = finite ? scale : amax - amax;
  }
}

// Inputs [0, count) of a group as float32 with zeros up to `padded`; all zeros where one is not finite.
template <class E>
float load_group(const typename E::T* row, std::int64_t count, std::int64_t padded, float* x) {
  const float amax = activation_amax<E>(row, count);
  const std::int64_t used = amax <= FLT_MAX ? count : 0;
  for (std::int64_t i = 0; i < padded; i += kWidth) {
    const std::int64_t rest = used - i;
    store_f32(x + i, rest >= kWidth ? E::load(row + i) : rest > 0 ? load_part<E>(row + i, rest) : set1(0.0f));
  }
  return amax;
}

template <Compute Mode>
void prepare_acts(const MatmulArgs& a, std::int64_t begin, std::int64_t end) {
  const Layout& l = *a.layout;
  const Acts out(l, a.rows, Mode, a.workspace);
  const __m128i offset = _mm_set1_epi16(static_cast<std::int16_t>(-(1 << (l.num_bits - 1))));
  with_type(a.x.dtype, [&](auto element) {
    using E = decltype(element);
    alignas(32) float x[kActGroup];
    for (std::int64_t m = begin; m < end; ++m) {
      const auto* row = static_cast<const typename E::T*>(a.x.data) + m * a.x.stride;
      for (std::int64_t g = 0; g < out.groups; ++g) {
        const std::int64_t k = g * kActGroup, padded = min64(kActGroup, l.k_padded - k);
        const float amax = load_group<E>(row + k, min64(kActGroup, l.k - k), padded, x);
        if (l.num_bits == 8)
          code_group<true>(out, m * out.planes, g, amax, offset, x, padded);
        else
          code_group<false>(out, m * out.planes, g, amax, offset, x, padded);
      }
    }
  });
}

}  // namespace
}  // namespace qtale::cpu

// Activations as the AVX2 kernels read them, in rows.
#pragma once

#include "cpu/matmul_avx2.inl"

namespace qtale::cpu {
namespace {

// Bytes from row to row: an odd number of cache lines, so that the rows of a tile do not fall into the same L1 sets.
inline std::int64_t row_stride(std::int64_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

struct Int8Acts {
  std::int64_t flush;    // inputs per set of accumulators: 16-bit lanes hold 64 inputs of 4 bits, 128 of fewer
  std::int64_t flushes;  // per row
  std::int64_t groups;   // scales per row
  std::int64_t stride;   // bytes from row to row of codes
  std::byte* codes;      // int8; for 8-bit weights int16, and inputs 1 and 2 of every four change places
  std::int64_t rows;
  std::int32_t* starts;  // [flushes, rows]: what the accumulators start at, a pair of 16-bit lanes; 0 for 8 bits
  float* sums;           // [flushes, rows]: sums of the codes
  float* scales;         // [groups, rows]
  std::size_t bytes;

  Int8Acts(const Layout& l, std::int64_t row_count, std::byte* workspace)
      : flush(l.num_bits == 4 ? min64(64, l.block_k) : l.block_k),
        flushes((l.k_padded + flush - 1) / flush),
        groups(l.act_groups),
        stride(row_stride(l.num_bits == 8 ? 2 * l.k_padded : l.k_padded)),
        rows(row_count) {
    const std::size_t code_bytes = static_cast<std::size_t>(rows * stride);
    const std::size_t flush_bytes = aligned(static_cast<std::size_t>(rows * flushes) * sizeof(float));
    codes = workspace;
    starts = reinterpret_cast<std::int32_t*>(workspace + code_bytes);
    sums = reinterpret_cast<float*>(workspace + code_bytes + flush_bytes);
    scales = reinterpret_cast<float*>(workspace + code_bytes + 2 * flush_bytes);
    bytes = code_bytes + 2 * flush_bytes + aligned(static_cast<std::size_t>(rows * groups) * sizeof(float));
  }
};

inline std::size_t int8_acts_bytes(const Layout& l, std::int64_t rows) { return Int8Acts(l, rows, nullptr).bytes; }

// The 16-bit sums of inputs 4i, 4i + 1 and of inputs 4i + 2, 4i + 3.
inline __m128i sum_lanes(const std::int8_t* codes, std::int64_t count) {
  const __m256i ones = _mm256_set1_epi8(1);
  __m256i sum = _mm256_setzero_si256();
  for (std::int64_t i = 0; i < count; i += 32)
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(ones, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i))));
  __m128i half = _mm_add_epi16(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  half = _mm_add_epi16(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_add_epi16(half, _mm_shuffle_epi32(half, 0xb1));
}

inline void widen_codes(const std::int8_t* codes, std::int64_t count, std::byte* out) {
  const __m128i swap = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  for (std::int64_t i = 0; i < count; i += 16) {
    const __m128i line = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)), swap);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 2 * i), _mm256_cvtepi8_epi16(line));
  }
}

template <class E>
void prepare_int8_row(const Layout& l, const Int8Acts& out, std::int64_t m, const typename E::T* row) {
  alignas(32) std::int8_t codes[kActGroup];
  const __m128i offset = _mm_set1_epi16(static_cast<std::int16_t>(l.num_bits == 8 ? 0 : -(1 << (l.num_bits - 1))));
  for (std::int64_t g = 0; g < out.groups; ++g) {
    const std::int64_t k = g * kActGroup, padded = min64(kActGroup, l.k_padded - k);
    out.scales[g * out.rows + m] =
        quantize_activation_group<E>(row + k, min64(kActGroup, l.k - k), padded, codes);
    for (std::int64_t i = 0; i < padded; i += out.flush) {
      const std::int64_t at = (k + i) / out.flush * out.rows + m;
      const __m128i lanes = sum_lanes(codes + i, min64(out.flush, padded - i));
      out.starts[at] = _mm_cvtsi128_si32(_mm_mullo_epi16(lanes, offset));
      out.sums[at] = static_cast<float>(_mm_cvtsi128_si32(_mm_madd_epi16(lanes, _mm_set1_epi16(1))));
    }
    std::byte* to = out.codes + m * out.stride;
    if (l.num_bits == 8) {
      widen_codes(codes, padded, to + 2 * k);
    } else {
      std::memcpy(to + k, codes, static_cast<std::size_t>(padded));
    }
  }
}

void prepare_int8_acts(const MatmulArgs& a, std::int64_t begin, std::int64_t end) {
  const Int8Acts out(*a.layout, a.rows, a.workspace);
  with_type(a.x.dtype, [&](auto element) {
    using E = decltype(element);
    for (std::int64_t m = begin; m < end; ++m)
      prepare_int8_row<E>(*a.layout, out, m, static_cast<const typename E::T*>(a.x.data) + m * a.x.stride);
  });
}

}  // namespace
}  // namespace qtale::cpu

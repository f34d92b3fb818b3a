// What AMX reads: activations cut into tiles, and part of a panel with its codes as bytes and its scales as floats.
#pragma once

#include "core/integers.h"
#include "cpu/amx.inl"
#include "cpu/codes_avx512.inl"

namespace qtale::cpu {
namespace {

constexpr std::int64_t kTileK = kTileLine;       // inputs of a tile of activations; blocks of 32 use half of it
constexpr std::int64_t kLineStride = 4 * kRows;  // bytes from four inputs of a panel to the next four

// Tiles 4 and 5 are activations, 6 and 7 codes, `step_k` inputs of each.
inline TileShapes tile_shapes(std::int64_t step_k) {
  TileShapes shapes;
  for (const int activations : {4, 5}) shapes.set(activations, kTileRows, step_k);
  for (const int codes : {6, 7}) shapes.set(codes, step_k / 4, kTileLine);
  return shapes;
}

// From so many rows on tiles are faster than registers; later where much has to be unpacked or scaled.
inline std::int64_t fewest_rows(const Layout& l) {
  return !l.per_channel && (l.num_bits == 8 || l.block_k == 32) ? 28 : 20;
}

// Rows of activations beside the row-major form: [rows / 16][k / 64][16][64], zeros behind the last input.
struct ActTiles {
  std::int8_t* codes;
  std::int64_t row_bytes;  // of 16 rows

  ActTiles(const Layout& l, std::int64_t rows, std::byte* workspace)
      : codes(reinterpret_cast<std::int8_t*>(workspace + int8_rows_bytes(l, rows))),
        row_bytes(ceil_div(l.k_padded, kTileK) * kTileBytes) {}
  const std::int8_t* at(std::int64_t m, std::int64_t k) const {
    return codes + m / kTileRows * row_bytes + k / kTileK * kTileBytes + k % kTileK;
  }
};

inline std::size_t amx_rows_bytes(const Layout& l, std::int64_t rows) {
  const std::int64_t bytes = ceil_div(rows, kTileRows) * ceil_div(l.k_padded, kTileK) * kTileBytes;
  return int8_rows_bytes(l, rows) + static_cast<std::size_t>(bytes);
}

inline void prepare_amx_rows(const MatmulArgs& a, std::int64_t begin, std::int64_t end) {
  prepare_int8_rows(a, begin, end);
  const Layout& l = *a.layout;
  if (a.rows < fewest_rows(l)) return;
  const Int8Rows rows(l, a.rows, a.workspace);
  const ActTiles tiles(l, a.rows, a.workspace);
  for (std::int64_t m = begin; m < end; ++m) {
    const std::int8_t* from = rows.codes + m * l.k_padded;
    std::int8_t* to = tiles.codes + m / kTileRows * tiles.row_bytes + m % kTileRows * kTileK;
    for (std::int64_t k = 0; k < l.k_padded; k += kTileK, to += kTileBytes) {
      const __mmask64 inside = l.k_padded - k >= kTileK ? ~__mmask64{0} : 0xffffffff;
      _mm512_storeu_si512(to, _mm512_maskz_loadu_epi8(inside, from + k));
    }
  }
}

// Part of a panel, unpacked. Grouped codes become signed and lose their zero points, but for those of 8 bits, which
// leave no room for it; with one scale per row both are taken off at the end, from the sums of all inputs.
struct PanelPart {
  const std::uint8_t* codes;  // [k / 4][64][4]
  float* scales;              // [blocks][64] of a grouped panel
  std::int32_t* zeros;        // [blocks][64] of a grouped, asymmetric panel of 8 bits
};

inline bool zeros_in_sums(const Layout& l) { return !l.per_channel && !l.symmetric && l.num_bits == 8; }

template <int Bits>
QTALE_INLINE void load_offsets(__m512i (&minus)[kVecs], const Layout& l, const std::uint8_t* zeros) {
  const __m512i first_bytes = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
  unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA {
    minus[p] = _mm512_set1_epi8(static_cast<char>(l.per_channel ? 0 : Codes<Bits>::kOffset));
    if (l.per_channel || l.symmetric || Bits == 8) return;
    minus[p] = _mm512_add_epi8(minus[p], _mm512_shuffle_epi8(load_zeros(zeros, p), first_bytes));
  });
}

template <int Bits>
void unpack_codes(const Layout& l, const std::uint8_t* panel, Span blocks, std::uint8_t* to) {
  using C = Codes<Bits>;
  for (std::int64_t b = blocks.begin; b < blocks.end; ++b) {
    const std::uint8_t* w = panel + l.block_offset(b);
    __m512i minus[kVecs];
    load_offsets<Bits>(minus, l, w + l.code_bytes + l.scale_bytes);
    for (std::int64_t steps = l.block_size(b) / C::kInputs; steps > 0; --steps, w += C::kBytes)
      unroll<C::kFields>([&](auto field) QTALE_INLINE_LAMBDA {
        unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA {
          _mm512_store_si512(to + 64 * p, _mm512_sub_epi8(C::template get<field>(w, p), minus[p]));
        });
        to += kLineStride;
      });
  }
}

inline void unpack(const Layout& l, const std::uint8_t* panel, Span blocks, const PanelPart& part,
                   std::uint8_t* codes) {
  switch (l.num_bits) {
    case 2: unpack_codes<2>(l, panel, blocks, codes); break;
    case 3: unpack_codes<3>(l, panel, blocks, codes); break;
    case 4: unpack_codes<4>(l, panel, blocks, codes); break;
    default: unpack_codes<8>(l, panel, blocks, codes);
  }
  if (l.per_channel) return;
  for (std::int64_t b = blocks.begin, i = 0; b < blocks.end; ++b, ++i) {
    const std::uint8_t* params = panel + l.param_offset(b);
    __m512 scale[kVecs];
    load_scales(scale, params, l.scale_dtype);
    for (int p = 0; p < kVecs; ++p) _mm512_store_ps(part.scales + i * kRows + 16 * p, scale[p]);
    if (!zeros_in_sums(l)) continue;
    for (int p = 0; p < kVecs; ++p)
      _mm512_store_si512(part.zeros + i * kRows + 16 * p, load_zeros(params + l.scale_bytes, p));
  }
}

}  // namespace
}  // namespace qtale::cpu

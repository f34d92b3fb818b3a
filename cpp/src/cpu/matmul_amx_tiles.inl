// What AMX reads: activations cut into tiles, and part of a panel with its codes as bytes and its scales as floats.
#pragma once

#include <limits>

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

// From so many rows on tiles are faster than registers: earlier the more registers have to do to unpack codes.
inline std::int64_t fewest_rows(const Layout& l) {
  switch (l.num_bits) {
    case 2: return 10;
    case 3: return l.block_k == 32 ? 11 : 10;
    case 4: return l.block_k == 32 ? 28 : 12;
    default: return l.block_k == 32 ? 28 : 25;
  }
}

// Rows of activations beside the row-major form: [rows / 16][k / 64][16][64], zeros behind the last input.
struct ActTiles {
  std::int8_t* codes;
  std::int64_t row_bytes;  // of 16 rows

  ActTiles(const Layout& l, std::int64_t rows, std::byte* workspace)
      : codes(reinterpret_cast<std::int8_t*>(workspace + code_rows_bytes(l, rows))),
        row_bytes(ceil_div(l.k_padded, kTileK) * kTileBytes) {}
  const std::int8_t* at(std::int64_t m, std::int64_t k) const {
    return codes + m / kTileRows * row_bytes + k / kTileK * kTileBytes + k % kTileK;
  }
};

template <int Planes>
std::size_t amx_rows_bytes(const Layout& l, std::int64_t rows) {
  const std::int64_t bytes = ceil_div(rows * Planes, kTileRows) * ceil_div(l.k_padded, kTileK) * kTileBytes;
  return int8_rows_bytes<Planes>(l, rows) + static_cast<std::size_t>(bytes);
}

template <int Planes>
void prepare_amx_rows(const MatmulArgs& a, std::int64_t begin, std::int64_t end) {
  prepare_int8_rows<Planes>(a, begin, end);
  const Layout& l = *a.layout;
  const std::int64_t all = a.rows * Planes;
  if (all < fewest_rows(l)) return;
  const Int8Rows rows(l, all, a.workspace);
  const ActTiles tiles(l, all, a.workspace);
  for (std::int64_t m = begin * Planes; m < end * Planes; ++m) {
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

// A part on its way: it is unpacked some steps at a time, while another one is multiplied.
class Unpacking {
 public:
  Unpacking() = default;
  // Into `part`, whose codes lie at `codes`.
  Unpacking(const Layout& l, const std::uint8_t* panel, Span blocks, const PanelPart& part, std::uint8_t* codes)
      : l_(&l),
        panel_(panel),
        blocks_(blocks),
        codes_(codes),
        scales_(part.scales),
        zeros_(part.zeros),
        kind_(kind_of(l.num_bits)) {}

  bool done() const { return blocks_.begin >= blocks_.end; }
  void some(std::int64_t steps) {
    if (!done()) kind_.some(*this, steps);
  }
  void rest() { some(std::numeric_limits<std::int64_t>::max()); }
  // Steps of so many blocks.
  static std::int64_t steps(const Layout& l, std::int64_t blocks) {
    return blocks * ceil_div(l.block_k, kind_of(l.num_bits).inputs);
  }

 private:
  // Bytes of a panel that memory is asked for before they are unpacked.
  static constexpr std::int64_t kAheadOfUnpacking = 16384;
  struct Kind {
    void (*some)(Unpacking&, std::int64_t steps);
    std::int64_t inputs;  // of a step
  };

  static Kind kind_of(int num_bits) {
    switch (num_bits) {
      case 2: return {unpack_some<2>, Codes<2>::kInputs};
      case 3: return {unpack_some<3>, Codes<3>::kInputs};
      case 4: return {unpack_some<4>, Codes<4>::kInputs};
      default: return {unpack_some<8>, Codes<8>::kInputs};
    }
  }

  template <int Bits>
  static void unpack_some(Unpacking& u, std::int64_t steps) {
    using C = Codes<Bits>;
    const Layout& l = *u.l_;
    while (steps > 0 && !u.done()) {
      const std::int64_t b = u.blocks_.begin, all = l.block_size(b) / C::kInputs, now = min64(steps, all - u.step_);
      if (u.step_ == 0) u.take_params(u.panel_ + l.param_offset(b));
      const std::uint8_t* w = u.panel_ + l.block_offset(b) + u.step_ * C::kBytes;
      __m512i minus[kVecs];
      load_offsets<Bits>(minus, l, u.panel_ + l.param_offset(b) + l.scale_bytes);
      for (std::int64_t i = 0; i < now; ++i, w += C::kBytes) {
        for (int line = 0; line < C::kBytes; line += 64)
          _mm_prefetch(reinterpret_cast<const char*>(w + kAheadOfUnpacking + line), _MM_HINT_T1);
        unroll<C::kFields>([&](auto field) QTALE_INLINE_LAMBDA {
          unroll<kVecs>([&](auto p) QTALE_INLINE_LAMBDA {
            _mm512_store_si512(u.codes_ + 64 * p, _mm512_sub_epi8(C::template get<field>(w, p), minus[p]));
          });
          u.codes_ += kLineStride;
        });
      }
      steps -= now;
      u.step_ += now;
      if (u.step_ < all) continue;
      u.step_ = 0;
      ++u.blocks_.begin;
    }
  }

  void take_params(const std::uint8_t* params) {
    if (l_->per_channel) return;
    __m512 scale[kVecs];
    load_scales(scale, params, l_->scale_dtype);
    for (int p = 0; p < kVecs; ++p) _mm512_store_ps(scales_ + 16 * p, scale[p]);
    scales_ += kRows;
    if (!zeros_in_sums(*l_)) return;
    for (int p = 0; p < kVecs; ++p) _mm512_store_si512(zeros_ + 16 * p, load_zeros(params + l_->scale_bytes, p));
    zeros_ += kRows;
  }

  const Layout* l_ = nullptr;
  const std::uint8_t* panel_ = nullptr;
  Span blocks_{0, 0};      // that are left
  std::int64_t step_ = 0;  // of the first of them
  // Where the next ones go.
  std::uint8_t* codes_ = nullptr;
  float* scales_ = nullptr;
  std::int32_t* zeros_ = nullptr;
  Kind kind_{};
};

}  // namespace
}  // namespace qtale::cpu

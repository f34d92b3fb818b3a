// Sums that AMX left in memory, on their way into the outputs: the same operations on floats as in matmul_avx512.inl,
// so that a row has the same bits in a batch and alone.
#pragma once

#include "cpu/matmul_amx_tiles.inl"

namespace qtale::cpu {
namespace {

constexpr std::int64_t kUnitRows = 32, kUnitCols = 32;  // of sums that are multiplied at once
constexpr int kUnitVecs = 2;
constexpr std::int64_t kUnitSums = kUnitRows * kUnitCols;
alignas(64) constexpr float kNoSums[kUnitCols] = {};
constexpr int kMostBlocks = 4;  // weight blocks that share one scale of activations

// The sums of one unit, for each weight block of one group of activations.
struct Sums {
  const std::int32_t* sums = nullptr;  // [blocks][32][32]
  const float* scales = nullptr;       // of the first block's columns, 64 to the next; likewise
  const std::int32_t* zeros = nullptr;
  const float* act = nullptr;  // scale of the first row
  std::int64_t ld_act = 0;
  const std::int32_t* act_sums = nullptr;
  std::int64_t ld_act_sums = 0;
  float* out = nullptr;        // [activation rows][64]
  const float* add = nullptr;  // what is there before: out or, at the first group, zeros
  std::int64_t ld_add = 0;
  std::int64_t rows = 0;  // of codes; 0: there are none
  void (*scale)(const Sums&) = nullptr;

  void finish() {
    if (rows > 0) scale(*this);
    rows = 0;
  }
};

template <int Planes>
__attribute__((noipa)) void tile_scale_channel(const Sums& s) {
  const std::int32_t* sums = s.sums;
  const float* act = s.act;
  const float* add = s.add;
  float* out = s.out;
  for (std::int64_t rows = s.rows / Planes; rows > 0; --rows) {
    __m512 sum[kUnitVecs];
    unroll<kUnitVecs>([&](auto v) QTALE_INLINE_LAMBDA { sum[v] = _mm512_load_ps(add + 16 * v); });
    unroll<Planes>([&](auto) QTALE_INLINE_LAMBDA {
      const __m512 activation = _mm512_set1_ps(*act);
      unroll<kUnitVecs>([&](auto v) QTALE_INLINE_LAMBDA {
        sum[v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + 16 * v)), activation, sum[v]);
      });
      sums += kUnitCols;
      act += s.ld_act;
    });
    unroll<kUnitVecs>([&](auto v) QTALE_INLINE_LAMBDA { _mm512_store_ps(out + 16 * v, sum[v]); });
    add += s.ld_add;
    out += kRows;
  }
}

template <int Planes, int Blocks, bool Zeros>
__attribute__((noipa)) void tile_scale_grouped(const Sums& s) {
  __m512 scale[Blocks][kUnitVecs];
  __m512i zero[Blocks][kUnitVecs];
  unroll<Blocks>([&](auto b) QTALE_INLINE_LAMBDA {
    unroll<kUnitVecs>([&](auto v) QTALE_INLINE_LAMBDA {
      scale[b][v] = _mm512_load_ps(s.scales + b * kRows + 16 * v);
      if constexpr (Zeros) zero[b][v] = _mm512_load_si512(s.zeros + b * kRows + 16 * v);
    });
  });
  const std::int32_t* sums = s.sums;
  const std::int32_t* act_sums = s.act_sums;
  const float* act = s.act;
  const float* add = s.add;
  float* out = s.out;
  for (std::int64_t rows = s.rows / Planes; rows > 0; --rows) {
    __m512 all[kUnitVecs];
    unroll<kUnitVecs>([&](auto v) QTALE_INLINE_LAMBDA { all[v] = _mm512_load_ps(add + 16 * v); });
    unroll<Planes>([&](auto) QTALE_INLINE_LAMBDA {
      const __m512 activation = _mm512_set1_ps(*act);
      unroll<kUnitVecs>([&](auto v) QTALE_INLINE_LAMBDA {
        __m512 value;
        unroll<Blocks>([&](auto b) QTALE_INLINE_LAMBDA {
          __m512i sum = _mm512_load_si512(sums + b * kUnitSums + 16 * v);
          if constexpr (Zeros)
            sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(zero[b][v], _mm512_set1_epi32(act_sums[b])));
          const __m512 term = _mm512_cvtepi32_ps(sum);
          value = b == 0 ? _mm512_mul_ps(term, scale[b][v]) : _mm512_fmadd_ps(term, scale[b][v], value);
        });
        all[v] = _mm512_fmadd_ps(value, activation, all[v]);
      });
      sums += kUnitCols;
      act_sums += s.ld_act_sums;
      act += s.ld_act;
    });
    unroll<kUnitVecs>([&](auto v) QTALE_INLINE_LAMBDA { _mm512_store_ps(out + 16 * v, all[v]); });
    add += s.ld_add;
    out += kRows;
  }
}

template <int Planes>
auto pick_scale(const Layout& l, std::int64_t blocks) {
  using Fn = decltype(Sums::scale);
  static constexpr Fn kPlain[kMostBlocks] = {tile_scale_grouped<Planes, 1, false>, tile_scale_grouped<Planes, 2, false>,
                                             tile_scale_grouped<Planes, 3, false>,
                                             tile_scale_grouped<Planes, 4, false>};
  static constexpr Fn kZeros[kMostBlocks] = {tile_scale_grouped<Planes, 1, true>, tile_scale_grouped<Planes, 2, true>,
                                             tile_scale_grouped<Planes, 3, true>, tile_scale_grouped<Planes, 4, true>};
  if (l.per_channel) return Fn{tile_scale_channel<Planes>};
  return (zeros_in_sums(l) ? kZeros : kPlain)[blocks - 1];
}

}  // namespace
}  // namespace qtale::cpu

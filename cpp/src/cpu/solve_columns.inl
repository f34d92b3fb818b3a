// The column loops of gptq and of coordinate descent; rows in lanes.
#pragma once

#include "cpu/solve_grid.inl"

namespace qtale::cpu::solving {
namespace {

// Rows of a panel that stay in the first cache while all tiles of a block meet them.
constexpr std::int64_t kDepth = 128;

// Asks for the entries of the product after this one: they come from a larger cache, where a short stream starts late.
template <int Tile>
inline void read_entries_ahead(const float* entries, std::int64_t steps) {
  for (std::int64_t at = 0; at < steps * Tile; at += 16) __builtin_prefetch(entries + at);
}

template <int Tile, int Vecs>
void advance_columns(const ColumnBlock& b, float* work) {
  constexpr int kLanes = Vecs * kWidth;
  alignas(64) float sums[Tile * kLanes];
  for (std::int64_t k = 0; k < b.begin; k += kDepth) {
    const float* packed = b.packed + k * Tile;
    for (std::int64_t c = b.begin; c < b.end; c += Tile, packed += b.tile_stride) {
      const std::int64_t steps = min64(kDepth, b.begin - k);
      read_entries_ahead<Tile>(c + Tile < b.end ? packed + b.tile_stride : b.packed + (k + kDepth) * Tile, steps);
      tile_sums<Tile, Vecs>(work + k * kLanes, packed, steps, sums);
      float* const columns = work + c * kLanes;
      for (std::int64_t at = 0; at < min64(Tile, b.end - c) * kLanes; at += kWidth)
        store_f32(columns + at, add(load_f32(columns + at), load_f32(sums + at)));
    }
  }
}

// Columns [begin, begin + count) of one tile, one after the other; `entries` [column][Tile] is the factor within it.
template <int Tile, int Vecs>
inline void code_tile(const ColumnBlock& b, std::int64_t begin, std::int64_t count, const float* entries,
                      const PanelState& s, VecF (&total)[Vecs]) {
  constexpr int kLanes = Vecs * kWidth;
  const Levels levels(b.num_bits);
  for (std::int64_t i = 0; i < count; ++i, entries += Tile) {
    float* const column = s.work + (begin + i) * kLanes;
    const float* const grids = s.grids + b.group_of[begin + i] * kGridRows * kLanes;
    const VecF inverse_diagonal = set1(b.inverse_diagonal[begin + i]);
    VecF error[Vecs];
    unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA {
      const GridVec grid = load_grid<Vecs>(grids + p * kWidth);
      const VecF w = load_f32(column + p * kWidth);
      const VecF level = levels.nearest(w, grid.inverse, grid.zero);
      store_s8(s.codes + b.order[begin + i] * kLanes + p * kWidth, add(level, grid.zero));
      error[p] = mul(sub(mul(level, grid.scale), w), inverse_diagonal);
      accumulate(total[p], error[p], error[p]);
      store_f32(column + p * kWidth, error[p]);
    });
    for (std::int64_t later = i + 1; later < count; ++later) {
      const VecF entry = set1(entries[later]);
      unroll<Vecs>([&](auto p) QTALE_INLINE_LAMBDA {
        float* const at = s.work + (begin + later) * kLanes + p * kWidth;
        store_f32(at, multiply_add(error[p], entry, load_f32(at)));
      });
    }
  }
}

template <int Tile, int Vecs>
void gptq_columns(const ColumnBlock& b, std::int64_t fresh, const PanelState& s) {
  constexpr int kLanes = Vecs * kWidth;
  alignas(64) float sums[Tile * kLanes];
  VecF total[Vecs];
  for (VecF& t : total) t = set1(0.0f);
  const float* packed = b.packed;
  for (std::int64_t c = b.begin; c < b.end; c += Tile, packed += b.tile_stride) {
    const std::int64_t count = min64(Tile, b.end - c);
    tile_sums<Tile, Vecs>(s.work + fresh * kLanes, packed + fresh * Tile, c - fresh, sums);
    float* const columns = s.work + c * kLanes;
    for (std::int64_t at = 0; at < count * kLanes; at += kWidth)
      store_f32(columns + at, add(load_f32(columns + at), load_f32(sums + at)));
    code_tile<Tile, Vecs>(b, c, count, packed + c * Tile, s, total);
  }
  for (int p = 0; p < Vecs; ++p) store_f32(s.totals + p * kWidth, total[p]);
}

// A step is taken only where it is clearly nearer, so that float32 rounding cannot raise the objective.
constexpr float kReluctance = 1.0f - 0x1p-9f;

// Coordinates [begin, begin + count) with the gradient H (w - q) in `sums`; `entries` [column][Tile] is H within them.
template <int Tile, int Vecs>
inline void refine_tile(const ColumnBlock& b, std::int64_t begin, std::int64_t count, const float* entries,
                        const PanelState& s, float* sums, VecF (&changes)[Vecs]) {
  constexpr int kLanes = Vecs * kWidth;
  const Levels levels(b.num_bits);
  for (std::int64_t i = 0; i < count; ++i, entries += Tile) {
    const float* const grids = s.grids + b.group_of[begin + i] * kGridRows * kLanes;
    const VecF newton = set1(b.inverse_diagonal[begin + i] * kReluctance);
    for (int p = 0; p < Vecs; ++p) {
      const GridVec grid = load_grid<Vecs>(grids + p * kWidth);
      std::int8_t* const code = s.codes + b.order[begin + i] * kLanes + p * kWidth;
      float* const residual = s.work + (begin + i) * kLanes + p * kWidth;
      const VecF before = load_s8(code);
      const VecF wanted = mul(mul(load_f32(sums + i * kLanes + p * kWidth), newton), grid.inverse);
      const VecF after = min(max(rint(add(before, wanted)), levels.low), levels.high);
      const VecF steps = sub(after, before), moved = mul(steps, grid.scale);
      store_s8(code, after);
      store_f32(residual, sub(load_f32(residual), moved));
      changes[p] = add(changes[p], min(mul(steps, steps), set1(1.0f)));
      for (std::int64_t later = i + 1; later < count; ++later) {
        float* const at = sums + later * kLanes + p * kWidth;
        store_f32(at, sub(load_f32(at), mul(moved, set1(entries[later]))));
      }
    }
  }
}

template <int Tile, int Vecs>
void refine_columns(const ColumnBlock& b, std::int64_t columns, const PanelState& s) {
  alignas(64) float sums[Tile * Vecs * kWidth];
  VecF changes[Vecs];
  for (VecF& change : changes) change = set1(0.0f);
  const float* packed = b.packed;
  for (std::int64_t c = b.begin; c < b.end; c += Tile, packed += b.tile_stride) {
    tile_sums<Tile, Vecs>(s.work, packed, columns, sums);
    refine_tile<Tile, Vecs>(b, c, min64(Tile, b.end - c), packed + c * Tile, s, sums, changes);
  }
  for (int p = 0; p < Vecs; ++p) store_f32(s.totals + p * kWidth, changes[p]);
}

}  // namespace
}  // namespace qtale::cpu::solving

// Grids of groups: ranges, their shrinking, rounding of scales; rows in lanes.
#pragma once

#include <cfloat>

#include "cpu/solve_tile.inl"

namespace qtale::cpu::solving {
namespace {

struct GridVec {
  VecF scale, inverse, zero;
};

struct Levels {
  float count, half;  // 2^b - 1, 2^(b - 1)
  VecF low, high;
  explicit Levels(int num_bits)
      : count(static_cast<float>((1 << num_bits) - 1)),
        half(static_cast<float>(1 << (num_bits - 1))),
        low(set1(-half)),
        high(set1(half - 1.0f)) {}
  // The nearest level as code - zero; NaN gives the lowest.
  QTALE_INLINE VecF nearest(VecF w, VecF inverse, VecF zero) const {
    return min(max(rint(mul(w, inverse)), sub(low, zero)), sub(high, zero));
  }
};

inline VecF rounded_scale(VecF wanted, DType dtype) {
  alignas(64) float scale[kWidth];
  with_type(dtype, [&](auto element) {
    using E = decltype(element);
    typename E::T stored[kWidth];
    E::store(stored, wanted);
    store_f32(scale, E::load(stored));
  });
  const float tiny = dtype == DType::f16 ? 0x1p-10f : dtype == DType::bf16 ? 0x1p-7f : FLT_EPSILON;
  for (float& s : scale) s = s < FLT_MIN ? tiny : s;
  return load_f32(scale);
}

// As quantize chooses it, from a range that includes 0.
inline GridVec choose_grid(const GridRule& rule, const Levels& levels, VecF lo, VecF hi) {
  GridVec grid;
  const VecF width = rule.symmetric ? max(sub(set1(0.0f), lo), hi) : sub(hi, lo);
  grid.scale = rounded_scale(div(width, set1(rule.symmetric ? levels.count * 0.5f : levels.count)), rule.scale_dtype);
  grid.inverse = div(set1(1.0f), grid.scale);
  grid.zero = set1(0.0f);
  if (!rule.symmetric) grid.zero = min(max(rint(sub(levels.low, mul(lo, grid.inverse))), levels.low), levels.high);
  return grid;
}

template <int Vecs>
inline void store_grid(float* to, const GridVec& grid) {
  constexpr int kLanes = Vecs * kWidth;
  store_f32(to + kScale * kLanes, grid.scale);
  store_f32(to + kInverse * kLanes, grid.inverse);
  store_f32(to + kZero * kLanes, grid.zero);
}
template <int Vecs>
inline GridVec load_grid(const float* from) {
  constexpr int kLanes = Vecs * kWidth;
  return {load_f32(from + kScale * kLanes), load_f32(from + kInverse * kLanes), load_f32(from + kZero * kLanes)};
}

// sum_i d_i * (half a form d)_i over the columns of a block; vector p of every lane at totals + p * kWidth.
template <int Tile, int Vecs>
void half_form(const ColumnBlock& b, const float* panel, float* totals) {
  constexpr int kLanes = Vecs * kWidth;
  alignas(64) float sums[Tile * kLanes];
  VecF total[Vecs];
  for (VecF& t : total) t = set1(0.0f);
  const float* packed = b.packed;
  for (std::int64_t c = b.begin; c < b.end; c += Tile, packed += b.tile_stride) {
    const std::int64_t count = min64(Tile, b.end - c);
    tile_sums<Tile, Vecs>(panel, packed, c + count, sums);
    for (std::int64_t i = 0; i < count; ++i)
      for (int p = 0; p < Vecs; ++p)
        accumulate(total[p], load_f32(sums + i * kLanes + p * kWidth), load_f32(panel + (c + i) * kLanes + p * kWidth));
  }
  for (int p = 0; p < Vecs; ++p) store_f32(totals + p * kWidth, total[p]);
}

// Squared errors of one vector of rows under a grid.
template <int Vecs>
inline VecF weighed_error(const Levels& levels, const GridVec& grid, const float* columns, std::int64_t count,
                          const float* diagonal) {
  constexpr int kLanes = Vecs * kWidth;
  const VecF low = sub(levels.low, grid.zero), high = sub(levels.high, grid.zero), down = sub(set1(0.0f), grid.scale);
  VecF sum = set1(0.0f);
  for (std::int64_t i = 0; i < count; ++i) {
    const VecF w = load_f32(columns + i * kLanes);
    const VecF d = multiply_add(min(max(rint(mul(w, grid.inverse)), low), high), down, w);
    accumulate(sum, d, diagonal == nullptr ? d : mul(d, set1(diagonal[i])));
  }
  return sum;
}

template <int Vecs>
inline void keep_errors(const Levels& levels, const GridVec& grid, const float* columns, std::int64_t count,
                        float* errors) {
  constexpr int kLanes = Vecs * kWidth;
  const VecF down = sub(set1(0.0f), grid.scale);
  for (std::int64_t i = 0; i < count; ++i) {
    const VecF w = load_f32(columns + i * kLanes);
    store_f32(errors + i * kLanes, multiply_add(levels.nearest(w, grid.inverse, grid.zero), down, w));
  }
}

template <int Tile, int Vecs>
struct GridSearch {
  static constexpr int kLanes = Vecs * kWidth;
  const GridRule& rule;
  const Importance& importance;
  const float* columns;
  std::int64_t count;
  float* scratch;
  Levels levels{rule.num_bits};
  VecF lo[Vecs] = {}, hi[Vecs] = {}, best[Vecs] = {};

  void find_range() {
    for (int p = 0; p < Vecs; ++p) {
      lo[p] = hi[p] = set1(0.0f);
      for (std::int64_t i = 0; i < count; ++i) {
        const VecF w = load_f32(columns + i * kLanes + p * kWidth);
        lo[p] = min(w, lo[p]);
        hi[p] = max(w, hi[p]);
      }
    }
  }

  void try_all(const GridVec (&grid)[Vecs], float* errors) const {
    if (importance.form == nullptr) {
      for (int p = 0; p < Vecs; ++p)
        store_f32(errors + p * kWidth,
                  weighed_error<Vecs>(levels, grid[p], columns + p * kWidth, count, importance.diagonal));
      return;
    }
    for (int p = 0; p < Vecs; ++p)
      keep_errors<Vecs>(levels, grid[p], columns + p * kWidth, count, scratch + p * kWidth);
    half_form<Tile, Vecs>({importance.form, count * Tile, nullptr, nullptr, nullptr, 0, count, 0}, scratch, errors);
  }

  // The first of equally good grids stays.
  void run(float* out) {
    find_range();
    alignas(64) float errors[kLanes] = {};
    const bool one = rule.steps == 1 && !rule.both_signs;
    for (int step = 0; step < rule.steps; ++step) {
      const VecF factor = set1(rule.factor(step));
      GridVec grid[Vecs];
      for (int p = 0; p < Vecs; ++p) grid[p] = choose_grid(rule, levels, mul(lo[p], factor), mul(hi[p], factor));
      for (int sign = 0; sign <= static_cast<int>(rule.both_signs); ++sign) {
        if (!one) try_all(grid, errors);
        for (int p = 0; p < Vecs; ++p) {
          take(step + sign == 0, grid[p], load_f32(errors + p * kWidth), best[p], out + p * kWidth);
          grid[p].scale = sub(set1(0.0f), grid[p].scale);
          grid[p].inverse = sub(set1(0.0f), grid[p].inverse);
        }
      }
    }
  }

  static void take(bool first, const GridVec& grid, VecF error, VecF& least, float* out) {
    if (first) {
      store_grid<Vecs>(out, grid);
      least = error;
      return;
    }
    const GridVec before = load_grid<Vecs>(out);
    const VecF better = sub(error, least);
    store_grid<Vecs>(
        out, {where_negative(better, grid.scale, before.scale), where_negative(better, grid.inverse, before.inverse),
              where_negative(better, grid.zero, before.zero)});
    least = where_negative(better, error, least);
  }
};

template <int Tile, int Vecs>
void find_grid(const GridRule& rule, const Importance& importance, const float* columns, std::int64_t count,
               float* scratch, float* grid) {
  GridSearch<Tile, Vecs>{rule, importance, columns, count, scratch}.run(grid);
}

template <int Tile, int Vecs>
void round_columns(const GridRule& rule, const float* factor, std::int64_t count, float* scratch, float* columns) {
  constexpr int kLanes = Vecs * kWidth;
  alignas(64) float grid[kGridRows * kLanes];
  const Levels levels(rule.num_bits);
  for (std::int64_t i = 0; i < count; ++i)
    for (int p = 0; p < kLanes; p += kWidth)
      store_f32(scratch + i * kLanes + p, mul(load_f32(columns + i * kLanes + p), set1(factor[i])));
  find_grid<Tile, Vecs>(rule, {}, scratch, count, nullptr, grid);
  for (int p = 0; p < kLanes; p += kWidth) {
    const GridVec g = load_grid<Vecs>(grid + p);
    for (std::int64_t i = 0; i < count; ++i) {
      const VecF q = mul(levels.nearest(load_f32(scratch + i * kLanes + p), g.inverse, g.zero), g.scale);
      float* const at = columns + i * kLanes + p;
      store_f32(at, sub(mul(q, set1(1.0f / factor[i])), load_f32(at)));
    }
  }
}

}  // namespace
}  // namespace qtale::cpu::solving

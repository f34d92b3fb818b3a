// Solvers for the codes and scales of one weight, calibrated by the Gram matrix H = X^T X of its inputs.
// Grids are those of ops.h: weight ~ (code - zero_point) * scale, codes [out, in] s8, scale [out, groups] f32|f16|bf16,
// zero_point [out, groups] s8 or nullptr for symmetric. weight [out, in] is f32, its rows may be apart. Rows of a
// weight are independent: each is solved alone, and no bit of a result depends on threads. Arithmetic is float32. NaN
// and infinity are refused. H is a full symmetric matrix [in, in] f32.
#pragma once

#include <cstdint>

#include "qtale/tensor.h"

namespace qtale {

// How scales are searched: quantize's range times `steps` factors from `widest` down to `narrowest`; 1 step is its own
// rule.
struct ScaleSearch {
  int steps = 1;
  float widest = 1.0f;
  float narrowest = 0.5f;
  bool signed_scales = false;
};

// GPTQ (Frantar et al., ICLR 2023): columns in turn to the nearest code, each error spread over those not yet coded.
//   factor [in, in] f32: upper triangular U with H^-1 = U^T U, its rows and columns in the order of visits; only the
//   upper triangle is read. order [in] s32: the permutation in which columns are visited, or nullptr; column c belongs
//   to group c / group_size wherever it is visited.
//   static_scales: scale and zero_point are given. Otherwise they are found when a group begins, from what errors have
//   made of its weights (order must be nullptr); `search` with `importance` [in] f32, the diagonal of H, or nullptr.
//   loss [out] f64 or nullptr: sum_j ((w_j - q_j) / U_jj)^2 of every row = (w - q) H (w - q)^T.
void gptq(const TensorView& weight, const TensorView& factor, const TensorView* order, int num_bits,
          const TensorView& scale, const TensorView* zero_point, bool static_scales, const TensorView& codes,
          const TensorView* loss, const ScaleSearch& search = {}, const TensorView* importance = nullptr);

// Of the ranges of every row and group the one with the smallest error, the first of equals; scales are
// rounded to their dtype before errors are taken. importance [in] f32 >= 0: error = sum_i importance_i (w_i - q_i)^2;
// or [groups, group_size, group_size] f32, diagonal blocks of H: error = (w - q)^T H_g (w - q), of which the upper
// triangles are read.
void search_scales(const TensorView& weight, const TensorView& importance, int num_bits, const TensorView& scale,
                   const TensorView* zero_point, const ScaleSearch& search);

// Cyclic coordinate descent on (w - q)^T H (w - q) over codes, in place: each code in turn goes to the minimum on its
// grid, `sweeps` times through `order` ([in] s32, or nullptr), or until nothing changes. Steps that gain less than
// float32 can tell are not taken, so the objective does not rise. Returns the number of changes.
std::int64_t refine_codes(const TensorView& weight, const TensorView& hessian, int num_bits, const TensorView& scale,
                          const TensorView* zero_point, const TensorView* order, int sweeps, const TensorView& codes);

// Least squares on (w - q)^T H (w - q) over the scales of a row, jointly, with codes and zero points as given; in
// place. Scales keep their sign and are rounded to their dtype; a row keeps its old ones where that does not lower its
// objective. H is read as a full symmetric matrix, up to 1024 groups. Returns the number of rows that changed.
std::int64_t refit_scales(const TensorView& weight, const TensorView& hessian, int num_bits, const TensorView& codes,
                          const TensorView* zero_point, const TensorView& scale);

// prox of step * ||.||_inf of every row, or group of group_size (0: row): v - step * project(v / step) on the unit l1
// ball (Moreau; thresholds after Duchi et al., ICML 2008) = v clamped to +-t with sum_i max(|v_i| - t, 0) = step, or 0
// where ||v||_1 <= step. values [rows, in] f32, out [rows, in] f32, which may be values. t is exact to float32
// rounding.
void prox_linf(const TensorView& values, std::int64_t group_size, float step, const TensorView& out);
// The projection on the l1 ball of `radius` itself.
void project_l1(const TensorView& values, std::int64_t group_size, float radius, const TensorView& out);

// tr(D H D^T) for D = quantdequant(W diag(s)) diag(s)^-1 - W with quantize's grids, what AWQ's search minimises (Lin et
// al., MLSys 2024, eq. 4). column_scale [in] f32 > 0 or nullptr for 1; groups as in quantize (0: per row). Only the
// upper triangle of H is read.
double rounding_loss(const TensorView& weight, const TensorView& hessian, const TensorView* column_scale, int num_bits,
                     std::int64_t group_size, bool symmetric, DType scale_dtype);

// gram += x^T diag(row_weight) x on and above the diagonal; what is below stays.
//   x [n, in] f32|bf16, rows may be apart; gram [in, in] f64|f32; row_weight [n] f32 or nullptr. Sums over 1024 rows
//   are float32, those are added in gram's dtype: |error| <= 1026 * 2^-24 * sum_n |weight_n x_ni x_nj| with f64. AMX,
//   which sums bf16 without weights, takes numbers and sums below 2^-126 as zero.
void accumulate_gram(const TensorView& x, const TensorView* row_weight, const TensorView& gram);

}  // namespace qtale

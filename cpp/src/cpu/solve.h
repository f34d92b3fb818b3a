// Kernels of the weight solvers, one table per instruction set, and what the solvers call with checked arguments.
// Rows of a weight lie side by side in lanes: a panel is [columns][lanes] float32, its columns in the order of visits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"

namespace qtale::cpu {

// The grid of a group: three vectors of lanes, each a float per row.
enum GridRow : std::uint8_t { kScale, kInverse, kZero, kGridRows };

// How a group's grid is found: the range times the best of `steps` factors from `widest` to `narrowest`, with
// `both_signs` of the scale.
struct GridRule {
  int num_bits;
  bool symmetric;
  DType scale_dtype;  // what scales are rounded to
  int steps;
  float widest, narrowest;
  bool both_signs;

  float factor(int step) const {
    if (steps == 1) return 1.0f;
    return widest - (widest - narrowest) * static_cast<float>(step) / static_cast<float>(steps - 1);
  }
};

// What a group's errors are weighed with: a factor per column, or else a packed quadratic form, or else nothing.
struct Importance {
  const float* diagonal = nullptr;
  const float* form = nullptr;
};

// Columns [begin, end) of a panel. `packed` holds them in tiles of columns, each [rows][tile] of a matrix.
struct ColumnBlock {
  const float* packed;
  std::int64_t tile_stride;  // floats from tile to tile
  const float* inverse_diagonal;
  const std::int32_t* order;     // column of the weight that is visited
  const std::int32_t* group_of;  // of every column in the order of visits
  std::int64_t begin, end;
  int num_bits;
};

// One panel of the column loops.
struct PanelState {
  float* work;         // [columns][lanes]
  const float* grids;  // [groups][kGridRows][lanes]
  std::int8_t* codes;  // [columns][lanes], columns as the weight has them
  float* totals;       // [lanes]
};

struct ProxArgs {
  const float* values;
  std::int64_t stride;
  float* out;  // [rows, in]
  std::int64_t in_features, group_size;
  float step;
  bool project;  // the projection on the l1 ball of radius `step` itself
};

struct SolveKernels {
  std::int64_t lanes;
  std::int64_t tile;
  // sums[i][lane] = sum_k entries[k][i] * panel[k][lane] for the columns i of one tile.
  void (*sums)(const float* panel, const float* entries, std::int64_t steps, float* sums);
  // Rows of a weight to a panel; column i of the weight becomes column position[i]. Lanes beyond `rows` become 0.
  void (*load)(const float* weight, std::int64_t stride, std::int64_t rows, std::int64_t columns,
               const std::int32_t* position, float* panel);
  // The grid of one group from its `count` columns; `scratch` holds (count + tile) * lanes floats for a form.
  void (*grid)(const GridRule&, const Importance&, const float* columns, std::int64_t count, float* scratch,
               float* grid);
  // columns += what the errors of the columns before the block do to them.
  void (*advance)(const ColumnBlock&, float* work);
  // gptq's column loop. Columns before `fresh` have reached the block already. work becomes the error over the
  // diagonal, negated; totals the sum of its squares.
  void (*gptq)(const ColumnBlock&, std::int64_t fresh, const PanelState&);
  // One visit of coordinate descent; work [all columns] is weight - quantized. totals gets the changes of codes.
  void (*refine)(const ColumnBlock&, std::int64_t columns, const PanelState&);
  // totals[lane] = the block's part of d^T H d, H packed as half a form (upper triangle, twice what is off the
  // diagonal).
  void (*form)(const ColumnBlock&, const float* panel, float* totals);
  // panel = quantdequant(panel * factor) / factor - panel of one group
  void (*rounding)(const GridRule&, const float* factor, std::int64_t count, float* scratch, float* columns);
  // The first row in [begin, end) that is not finite, or -1.
  std::int64_t (*prox)(const ProxArgs&, std::int64_t begin, std::int64_t end);
};

extern const SolveKernels reference_solve_table;
extern const SolveKernels generic_solve_table;
#ifdef QTALE_X86
extern const SolveKernels avx2_solve_table;
extern const SolveKernels avx512_solve_table;
#endif

// A weight [rows, columns] with its grids [rows, groups].
struct SolveWeight {
  const float* data;
  std::int64_t stride, rows, columns, groups;
  int num_bits;
  void* scale;
  DType scale_dtype;
  std::int8_t* zero_point;  // or nullptr

  std::int64_t group_size() const { return columns / groups; }
};

struct GptqArgs {
  SolveWeight weight;
  const float* factor;  // [columns, columns]
  std::int64_t factor_stride;
  const std::int32_t* order;  // or nullptr: as they come
  bool static_scales;
  GridRule rule;            // of scales that are not static
  const float* importance;  // [columns] of the search, or nullptr
  std::int8_t* codes;       // [rows, columns]
  double* loss;             // [rows] or nullptr
};
struct SearchScalesArgs {
  SolveWeight weight;
  GridRule rule;
  const float* diagonal;  // [columns] or nullptr
  const float* blocks;    // [groups, group_size, group_size] or nullptr
};
struct RefineArgs {
  SolveWeight weight;
  const float* hessian;
  std::int64_t hessian_stride;
  const std::int32_t* order;  // or nullptr
  int sweeps;
  std::int8_t* codes;
};
struct RefitArgs {
  SolveWeight weight;
  const float* hessian;
  std::int64_t hessian_stride;
  const std::int8_t* codes;
};
struct RoundingLossArgs {
  SolveWeight weight;  // without grids
  const float* hessian;
  std::int64_t hessian_stride;
  const float* column_scale;  // or nullptr
  GridRule rule;
};
struct GramArgs {
  const void* x;
  DType dtype;  // f32 or bf16
  std::int64_t stride, rows, columns;
  const float* row_weight;  // [rows] or nullptr
  void* gram;
  DType gram_dtype;  // f32 or f64
  std::int64_t gram_stride;
};

void gptq(const GptqArgs& args);
void search_scales(const SearchScalesArgs& args);
std::int64_t refine_codes(const RefineArgs& args);  // codes changed
std::int64_t refit_scales(const RefitArgs& args);   // rows changed
void prox_linf(const ProxArgs& args, std::int64_t rows);
double rounding_loss(const RoundingLossArgs& args);
void accumulate_gram(const GramArgs& args);

}  // namespace qtale::cpu

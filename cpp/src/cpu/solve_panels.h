// A weight in panels with the grids of its groups: what the column loops work on, over all threads.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/scratch.h"
#include "cpu/solve.h"

namespace qtale::cpu {

// Columns that share one packed stretch of a matrix: a multiple of every tile.
inline constexpr std::int64_t kColumnBlock = 120;

// How entries of a square matrix are packed: as they are; or the upper triangle with twice what is off the diagonal.
enum class Packing : std::uint8_t { plain, half_form };

struct PackArgs {
  const float* matrix;
  std::int64_t stride;
  const std::int32_t* order;  // of rows and columns, or nullptr
  std::int64_t rows;          // from the first
  Packing packing;
};

std::int64_t packed_floats(const SolveKernels& kernels, std::int64_t rows, std::int64_t columns);
// Columns [begin, end) in tiles [rows][tile], zeros past the end. On the calling thread,
void pack_columns(const SolveKernels& kernels, const PackArgs& args, std::int64_t begin, std::int64_t end,
                  float* packed);
// or over all threads.
void pack_columns_parallel(const SolveKernels& kernels, const PackArgs& args, std::int64_t begin, std::int64_t end,
                           float* packed);

class SolvePanels {
 public:
  SolvePanels(const SolveKernels& kernels, const SolveWeight& weight, const std::int32_t* order);

  std::int64_t count() const { return count_; }
  std::int64_t lanes() const { return kernels_.lanes; }
  std::int64_t first_row(std::int64_t panel) const { return panel * kernels_.lanes; }
  std::int64_t rows(std::int64_t panel) const;
  float* work(std::int64_t panel) { return work_ + panel * weight_.columns * lanes(); }
  float* grids(std::int64_t panel) { return grids_ + panel * weight_.groups * kGridRows * lanes(); }
  const std::int32_t* order() const { return order_.data(); }
  const std::int32_t* group_of() const { return group_of_.data(); }

  void load(std::int64_t panel);
  // From scale and zero_point of the weight,
  void load_grids(std::int64_t panel);
  // and back.
  void store_grid(std::int64_t panel, std::int64_t group);

  // Codes of a panel [columns][lanes], columns as the weight has them; the first call makes memory for all.
  void make_codes();
  std::int8_t* codes(std::int64_t panel) { return codes_.data() + panel * weight_.columns * lanes(); }
  // From rows of codes and back.
  void load_codes(std::int64_t panel, const std::int8_t* rows);
  void store_codes(std::int64_t panel, std::int8_t* rows);

 private:
  const SolveKernels& kernels_;
  const SolveWeight& weight_;
  std::int64_t count_;
  std::vector<std::int32_t> order_, position_, group_of_;
  Scratch work_memory_, grid_memory_;
  float *work_, *grids_;
  std::vector<std::int8_t> codes_;
};

// One grid of lanes to scale and zero_point of a weight's rows.
void store_grid_rows(const SolveWeight& weight, std::int64_t first_row, std::int64_t rows, std::int64_t group,
                     std::int64_t lanes, const float* grid);

// Memory of the calling thread for `count` floats.
float* floats_of_thread(std::int64_t count);

}  // namespace qtale::cpu

// refit_scales over all threads: normal equations of the scales of every row, then rows one by one.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "core/half.h"
#include "cpu/isa.h"
#include "cpu/project.h"
#include "cpu/solve_panels.h"
#include "qtale/parallel.h"

namespace qtale::cpu {
namespace {

constexpr double kRidge = 1e-5;       // of the mean diagonal, towards the present scales
constexpr double kReluctance = 1e-4;  // gains below this part of a step's curvature may be float32 rounding
constexpr int kPolishes = 3;

float rounded(float value, DType dtype) {
  if (dtype == DType::f16) return f16_to_float(float_to_f16(value));
  if (dtype == DType::bf16) return bf16_to_float(float_to_bf16(value));
  return value;
}

// Least squares of one row: the objective changes by d A d - 2 b d with the scales' change d.
class RowScales {
 public:
  RowScales(std::int64_t groups, DType dtype)
      : n_(static_cast<std::size_t>(groups)), dtype_(dtype), a(n_ * n_), b(n_), scale(n_), l_(n_ * n_), moved_(n_) {}

 private:
  std::size_t n_;
  DType dtype_;

 public:
  std::vector<double> a, b;  // [groups, groups], [groups]
  std::vector<float> scale;

  // Whether any scale changed; the objective has fallen then.
  bool solve() {
    const std::vector<float> before = scale;
    std::fill(moved_.begin(), moved_.end(), 0.0);
    if (solve_jointly()) take_joint(before);
    for (int i = 0; i < kPolishes; ++i)
      for (std::size_t g = 0; g < n_; ++g) polish(g);
    return scale != before;
  }

 private:
  // Rounded to its dtype; the old one where that is 0, infinite or of the other sign.
  float storable(double wanted, float old) const {
    const float value = rounded(static_cast<float>(wanted), dtype_);
    const bool usable = std::isfinite(value) && std::isfinite(1.0f / value) && (value < 0.0f) == (old < 0.0f);
    return usable ? value : old;
  }

  // Cholesky of A with a ridge; the solution goes to moved_.
  bool solve_jointly() {
    double ridge = 0.0;
    for (std::size_t g = 0; g < n_; ++g) ridge += a[g * n_ + g] * kRidge / static_cast<double>(n_);
    for (std::size_t i = 0; i < n_; ++i) {
      for (std::size_t j = 0; j <= i; ++j) {
        double sum = a[j * n_ + i] + (i == j ? ridge : 0.0);
        for (std::size_t k = 0; k < j; ++k) sum -= l_[i * n_ + k] * l_[j * n_ + k];
        if (i == j && !(sum > 0.0)) return false;
        l_[i * n_ + j] = i == j ? std::sqrt(sum) : sum / l_[j * n_ + j];
      }
    }
    for (std::size_t i = 0; i < n_; ++i) {
      double sum = b[i];
      for (std::size_t k = 0; k < i; ++k) sum -= l_[i * n_ + k] * moved_[k];
      moved_[i] = sum / l_[i * n_ + i];
    }
    for (std::size_t i = n_; i-- > 0;) {
      double sum = moved_[i];
      for (std::size_t k = i + 1; k < n_; ++k) sum -= l_[k * n_ + i] * moved_[k];
      moved_[i] = sum / l_[i * n_ + i];
    }
    return true;
  }

  double slope(std::size_t g) const {
    double sum = b[g];
    for (std::size_t h = 0; h < n_; ++h) sum -= a[std::min(g, h) * n_ + std::max(g, h)] * moved_[h];
    return sum;
  }

  void take_joint(const std::vector<float>& before) {
    for (std::size_t g = 0; g < n_; ++g) {
      scale[g] = storable(static_cast<double>(before[g]) + moved_[g], before[g]);
      moved_[g] = static_cast<double>(scale[g]) - static_cast<double>(before[g]);
    }
    double gain = 0.0, curvature = 0.0;
    for (std::size_t g = 0; g < n_; ++g) {
      const double rest = slope(g);
      gain += moved_[g] * (b[g] + rest);
      curvature += moved_[g] * (b[g] - rest);
    }
    if (gain > kReluctance * curvature) return;
    scale = before;
    std::fill(moved_.begin(), moved_.end(), 0.0);
  }

  // One scale to its own minimum.
  void polish(std::size_t g) {
    const double curvature = a[g * n_ + g], rest = slope(g);
    if (!(curvature > 0.0)) return;
    const float value = storable(static_cast<double>(scale[g]) + rest / curvature, scale[g]);
    const double step = static_cast<double>(value) - static_cast<double>(scale[g]);
    if (!(step * (2.0 * rest - step * curvature) > kReluctance * step * step * curvature)) return;
    scale[g] = value;
    moved_[g] += step;
  }

  std::vector<double> l_, moved_;
};

class Refit {
 public:
  explicit Refit(const RefitArgs& args)
      : a_(args), kernels_(*kernels().solve), lanes_(kernels_.lanes), panels_(kernels_, args.weight, nullptr) {}

  std::int64_t run() {
    // What a batch of panels shares is the packing of H, what it costs are its normal equations.
    constexpr std::int64_t kBatchFloats = std::int64_t{64} << 20;
    const std::int64_t batch = std::max<std::int64_t>(num_threads(), kBatchFloats / panel_floats());
    for (first_ = 0; first_ < panels_.count(); first_ += batch) {
      count_ = std::min(batch, panels_.count() - first_);
      reserve();
      over_panels([&](std::int64_t panel) { load(panel); });
      build();
      over_panels([&](std::int64_t panel) { solve(panel); });
    }
    return changed_;
  }

 private:
  std::int64_t groups() const { return a_.weight.groups; }
  // Codes less zero points [columns][lanes], A [groups][groups][lanes], b [groups][lanes].
  std::int64_t panel_floats() const { return (a_.weight.columns + groups() * groups() + groups()) * lanes_; }
  float* levels(std::int64_t panel) const { return memory_ + (panel - first_) * panel_floats(); }
  float* normal(std::int64_t panel) const { return levels(panel) + a_.weight.columns * lanes_; }
  float* right(std::int64_t panel) const { return normal(panel) + groups() * groups() * lanes_; }

  template <class Fn>
  void over_panels(Fn&& fn) {
    parallel_for(count_, 1, [&](std::int64_t begin, std::int64_t end) {
      for (; begin < end; ++begin) fn(first_ + begin);
    });
  }

  void reserve() {
    const auto bytes = [](std::int64_t floats) { return static_cast<std::size_t>(floats) * sizeof(float); };
    memory_ = reinterpret_cast<float*>(batch_memory_.reserve(bytes(count_ * panel_floats())));
    packed_ = reinterpret_cast<float*>(
        packed_memory_.reserve(bytes(packed_floats(kernels_, a_.weight.columns, kColumnBlock))));
  }

  void load(std::int64_t panel) {
    panels_.load(panel);
    panels_.load_grids(panel);
    std::fill(levels(panel), levels(panel) + panel_floats(), 0.0f);
    const std::int64_t columns = a_.weight.columns;
    for (std::int64_t c = 0; c < columns; ++c) {
      const float* grid = panels_.grids(panel) + panels_.group_of()[c] * kGridRows * lanes_;
      for (std::int64_t lane = 0; lane < panels_.rows(panel); ++lane) {
        const std::int8_t code = a_.codes[(panels_.first_row(panel) + lane) * columns + c];
        const float level = static_cast<float>(code) - grid[kZero * lanes_ + lane];
        levels(panel)[c * lanes_ + lane] = level;
        panels_.work(panel)[c * lanes_ + lane] -= level * grid[kScale * lanes_ + lane];
      }
    }
  }

  void build() {
    const std::int64_t columns = a_.weight.columns;
    for (std::int64_t begin = 0; begin < columns; begin += kColumnBlock) {
      const std::int64_t end = std::min(begin + kColumnBlock, columns);
      pack_columns_parallel(kernels_, {a_.hessian, a_.hessian_stride, nullptr, columns, Packing::plain}, begin, end,
                            packed_);
      over_panels([&](std::int64_t panel) {
        for (std::int64_t c = begin; c < end; c += kernels_.tile)
          add_tile(panel, c, std::min(c + kernels_.tile, end), packed_ + (c - begin) * columns);
      });
    }
  }

  // What columns [begin, end) of H give to the normal equations.
  void add_tile(std::int64_t panel, std::int64_t begin, std::int64_t end, const float* entries) {
    const std::int64_t size = a_.weight.group_size(), tile = kernels_.tile;
    float* sums = floats_of_thread(tile * lanes_);
    kernels_.sums(panels_.work(panel), entries, a_.weight.columns, sums);
    for (std::int64_t c = begin; c < end; ++c)
      add_products(levels(panel) + c * lanes_, sums + (c - begin) * lanes_, right(panel) + c / size * lanes_);
    for (std::int64_t h = begin / size; h < groups(); ++h) {
      kernels_.sums(levels(panel) + h * size * lanes_, entries + h * size * tile, size, sums);
      for (std::int64_t c = begin; c < std::min(end, (h + 1) * size); ++c)
        add_products(levels(panel) + c * lanes_, sums + (c - begin) * lanes_,
                     normal(panel) + (c / size * groups() + h) * lanes_);
    }
  }

  void add_products(const float* x, const float* y, float* to) const {
    for (std::int64_t lane = 0; lane < lanes_; ++lane) to[lane] += x[lane] * y[lane];
  }

  void solve(std::int64_t panel) {
    RowScales row(groups(), a_.weight.scale_dtype);
    for (std::int64_t lane = 0; lane < panels_.rows(panel); ++lane) {
      const auto count = static_cast<std::size_t>(groups());
      for (std::size_t i = 0; i < count * count; ++i)
        row.a[i] = static_cast<double>(normal(panel)[static_cast<std::int64_t>(i) * lanes_ + lane]);
      for (std::size_t g = 0; g < count; ++g) {
        float* grid = panels_.grids(panel) + static_cast<std::int64_t>(g) * kGridRows * lanes_;
        row.b[g] = static_cast<double>(right(panel)[static_cast<std::int64_t>(g) * lanes_ + lane]);
        row.scale[g] = grid[kScale * lanes_ + lane];
      }
      if (!row.solve()) continue;
      ++changed_;
      for (std::size_t g = 0; g < count; ++g)
        panels_.grids(panel)[(static_cast<std::int64_t>(g) * kGridRows + kScale) * lanes_ + lane] = row.scale[g];
    }
    for (std::int64_t g = 0; g < groups(); ++g) panels_.store_grid(panel, g);
  }

  const RefitArgs& a_;
  const SolveKernels& kernels_;
  std::int64_t lanes_;
  SolvePanels panels_;
  Scratch batch_memory_, packed_memory_;
  float *memory_ = nullptr, *packed_ = nullptr;
  std::int64_t first_ = 0, count_ = 0;
  std::atomic<std::int64_t> changed_{0};
};

}  // namespace

std::int64_t refit_scales(const RefitArgs& args) { return Refit(args).run(); }

}  // namespace qtale::cpu

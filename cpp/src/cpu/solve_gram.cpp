// accumulate_gram over all threads: stretches of rows in turn, within each of them tiles of the upper triangle.
#include <algorithm>

#include "core/half.h"
#include "cpu/isa.h"
#include "cpu/project.h"
#include "cpu/scratch.h"
#include "cpu/solve.h"
#include "cpu/solve_panels.h"
#include "qtale/parallel.h"

namespace qtale::cpu {
namespace {

constexpr std::int64_t kStretch = 1024;  // rows that float32 sums run over

class Gram {
 public:
  explicit Gram(const GramArgs& args)
      : a_(args),
        kernels_(*kernels().solve),
        tiles_(args.dtype == DType::bf16 && args.row_weight == nullptr ? kernels().bf16_gram : nullptr),
        lanes_width_(tiles_ ? tiles_->width : kernels_.lanes),
        entries_width_(tiles_ ? tiles_->width : kernels_.tile),
        panels_(ceil_div(args.columns, lanes_width_)),
        depth_(std::min(kStretch, args.rows)),
        room_(tiles_ ? ceil_div(depth_, tiles_->row_step) * tiles_->row_step : depth_),
        entries_(floats(entry_memory_, ceil_div(args.columns, entries_width_) * floats_of(entries_width_))),
        lanes_(floats(lane_memory_, panels_ * floats_of(lanes_width_))) {}

  void run() {
    for (std::int64_t row = 0; row < a_.rows; row += depth_) {
      const std::int64_t count = std::min(depth_, a_.rows - row);
      tiles_ ? pack_tiles(row, count) : pack_rows(row, count);
      // Wide and narrow panels of the triangle in pairs, so that threads get like shares.
      parallel_for(panels_, 1, [&](std::int64_t begin, std::int64_t end) {
        for (; begin < end; ++begin) add_panel(begin % 2 == 0 ? begin / 2 : panels_ - 1 - begin / 2, count);
      });
    }
  }

 private:
  // Floats that a row of `width` columns takes: tiles hold two bf16 numbers in each.
  std::int64_t floats_of(std::int64_t width) const { return tiles_ ? width / 2 : width; }
  float* floats(Scratch& memory, std::int64_t width) {
    return reinterpret_cast<float*>(memory.reserve(static_cast<std::size_t>(width * room_) * sizeof(float)));
  }

  void pack_tiles(std::int64_t row, std::int64_t count) const {
    const std::int64_t panel_floats = floats_of(lanes_width_) * room_;
    const auto* x = static_cast<const std::uint16_t*>(a_.x) + row * a_.stride;
    parallel_for(panels_, 1, [&](std::int64_t begin, std::int64_t end) {
      for (; begin < end; ++begin) {
        const std::int64_t column = begin * lanes_width_, columns = std::min(lanes_width_, a_.columns - column);
        tiles_->pack(x + column, a_.stride, count, columns, lanes_ + begin * panel_floats,
                     entries_ + begin * panel_floats);
      }
    });
  }

  void pack_rows(std::int64_t row, std::int64_t count) const {
    parallel_for(count, 16, [&](std::int64_t begin, std::int64_t end) {
      for (; begin < end; ++begin) {
        pack_row(row, begin, lanes_width_, nullptr, lanes_);
        pack_row(row, begin, entries_width_, a_.row_weight, entries_);
      }
    });
  }

  // Row `first + r` of x into tiles [depth][width].
  void pack_row(std::int64_t first, std::int64_t r, std::int64_t width, const float* weights, float* to) const {
    const float weight = weights ? weights[first + r] : 1.0f;
    for (std::int64_t c = 0; c < a_.columns; c += width) {
      float* out = to + c * depth_ + r * width;
      const std::int64_t count = std::min(width, a_.columns - c), at = (first + r) * a_.stride + c;
      if (a_.dtype == DType::f32) {
        const float* x = static_cast<const float*>(a_.x) + at;
        for (std::int64_t i = 0; i < count; ++i) out[i] = x[i] * weight;
      } else {
        const auto* x = static_cast<const std::uint16_t*>(a_.x) + at;
        for (std::int64_t i = 0; i < count; ++i) out[i] = bf16_to_float(x[i]) * weight;
      }
      std::fill(out + count, out + width, 0.0f);
    }
  }

  void add_panel(std::int64_t panel, std::int64_t count) const {
    const std::int64_t lanes = lanes_width_, tile = entries_width_, first = panel * lanes;
    const std::int64_t last = std::min(first + lanes, a_.columns);
    float* sums = floats_of_thread(tile * lanes);
    for (std::int64_t i = 0; i < last; i += tile) {
      const auto each = tiles_ ? tiles_->sums : kernels_.sums;
      each(lanes_ + floats_of(first) * room_, entries_ + floats_of(i) * room_, count, sums);
      for (std::int64_t row = i; row < std::min(i + tile, last); ++row) {
        const std::int64_t from = std::max(first, row);
        const float* sum = sums + (row - i) * lanes + from - first;
        if (a_.gram_dtype == DType::f64) {
          add(static_cast<double*>(a_.gram) + row * a_.gram_stride + from, sum, last - from);
        } else {
          add(static_cast<float*>(a_.gram) + row * a_.gram_stride + from, sum, last - from);
        }
      }
    }
  }

  template <class T>
  static void add(T* to, const float* sums, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) to[i] += static_cast<T>(sums[i]);
  }

  const GramArgs& a_;
  const SolveKernels& kernels_;
  const GramKernel* tiles_;  // or nullptr: float32
  std::int64_t lanes_width_, entries_width_, panels_, depth_;
  std::int64_t room_;  // rows that panels have room for
  Scratch entry_memory_, lane_memory_;
  float *entries_, *lanes_;
};

}  // namespace

void accumulate_gram(const GramArgs& args) {
  if (args.rows > 0) Gram(args).run();
}

}  // namespace qtale::cpu

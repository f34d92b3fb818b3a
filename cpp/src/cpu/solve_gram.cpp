// accumulate_gram over all threads: stretches of rows in turn, within each of them tiles of the upper triangle.
#include <algorithm>

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
        panels_(ceil_div(args.columns, kernels_.lanes)),
        depth_(std::min(kStretch, args.rows)),
        entries_(floats(entry_memory_, ceil_div(args.columns, kernels_.tile) * kernels_.tile)),
        lanes_(floats(lane_memory_, panels_ * kernels_.lanes)) {}

  void run() {
    for (std::int64_t row = 0; row < a_.rows; row += depth_) {
      const std::int64_t count = std::min(depth_, a_.rows - row);
      parallel_for(count, 16, [&](std::int64_t begin, std::int64_t end) {
        for (; begin < end; ++begin) {
          pack(row, begin, kernels_.lanes, nullptr, lanes_);
          pack(row, begin, kernels_.tile, a_.row_weight, entries_);
        }
      });
      // Wide and narrow panels of the triangle in pairs, so that threads get like shares.
      parallel_for(panels_, 1, [&](std::int64_t begin, std::int64_t end) {
        for (; begin < end; ++begin) add_panel(begin % 2 == 0 ? begin / 2 : panels_ - 1 - begin / 2, count);
      });
    }
  }

 private:
  float* floats(Scratch& memory, std::int64_t width) {
    return reinterpret_cast<float*>(memory.reserve(static_cast<std::size_t>(width * depth_) * sizeof(float)));
  }

  // Row `first + r` of x into tiles [depth][width].
  void pack(std::int64_t first, std::int64_t r, std::int64_t width, const float* weights, float* to) const {
    const float* x = a_.x + (first + r) * a_.stride;
    const float weight = weights ? weights[first + r] : 1.0f;
    for (std::int64_t c = 0; c < a_.columns; c += width) {
      float* out = to + c * depth_ + r * width;
      const std::int64_t count = std::min(width, a_.columns - c);
      for (std::int64_t i = 0; i < count; ++i) out[i] = x[c + i] * weight;
      std::fill(out + count, out + width, 0.0f);
    }
  }

  void add_panel(std::int64_t panel, std::int64_t count) const {
    const std::int64_t lanes = kernels_.lanes, tile = kernels_.tile, first = panel * lanes;
    const std::int64_t last = std::min(first + lanes, a_.columns);
    float* sums = floats_of_thread(tile * lanes);
    for (std::int64_t i = 0; i < last; i += tile) {
      kernels_.sums(lanes_ + first * depth_, entries_ + i * depth_, count, sums);
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
  std::int64_t panels_, depth_;
  Scratch entry_memory_, lane_memory_;
  float *entries_, *lanes_;
};

}  // namespace

void accumulate_gram(const GramArgs& args) {
  if (args.rows > 0) Gram(args).run();
}

}  // namespace qtale::cpu

#include "matmul_oracle.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <sstream>

#include "core/integers.h"

namespace qtale::test {
namespace {

constexpr double kEps = 0x1p-24;  // half a unit in the last place of float32
constexpr std::int64_t kActGroup = 128;

// What storing in a dtype adds: half a unit in the last place, of normal and of subnormal numbers.
double storing(DType dtype, double y) {
  if (dtype == DType::f16) return std::fabs(y) * 0x1p-11 + 0x1p-25;
  if (dtype == DType::bf16) return std::fabs(y) * 0x1p-8;
  return std::fabs(y) * 0x1p-24 + 0x1p-149;
}

struct Rounded {
  std::vector<int> codes;     // [rows, k]
  std::vector<float> scales;  // [rows, groups of 128]
};

Rounded round_activations(const Activations& x) {
  Rounded out{std::vector<int>(x.rows * x.k), {}};
  for (std::int64_t m = 0; m < x.rows; ++m) {
    for (std::int64_t k0 = 0; k0 < x.k; k0 += kActGroup) {
      const std::int64_t end = std::min(x.k, k0 + kActGroup);
      float amax = 0.0f;
      for (std::int64_t k = k0; k < end; ++k) amax = std::max(amax, std::fabs(x.get(m, k)));
      const float scale = amax / 127.0f, inverse = scale >= FLT_MIN ? 1.0f / scale : 0.0f;
      for (std::int64_t k = k0; k < end; ++k)
        out.codes[m * x.k + k] = static_cast<int>(std::clamp(std::nearbyint(x.get(m, k) * inverse), -127.0f, 127.0f));
      out.scales.push_back(scale);
    }
  }
  return out;
}

// What a step of codes of 16 bits is worth, [rows, k].
std::vector<double> int16_steps(const Activations& x) {
  std::vector<double> out;
  for (std::int64_t m = 0; m < x.rows; ++m)
    for (std::int64_t k = 0; k < x.k; ++k) {
      const std::int64_t begin = k / kActGroup * kActGroup, end = std::min(x.k, begin + kActGroup);
      double amax = 0.0;
      for (std::int64_t i = begin; i < end; ++i) amax = std::max(amax, std::fabs(double{x.get(m, i)}));
      out.push_back(std::max(amax / 32258, 0x1p-118));
    }
  return out;
}

// Sum of integer products per run of inputs that share both scales. Integer sums are exact; the bound counts a rounding
// per 32 inputs, of products of unsigned codes (code + 2^(b-1)), as kernels may subtract what is too much afterwards.
void add_int8(const Weight& w, const Activations& x, const Rounded& r, std::int64_t m, std::int64_t n, double& y,
              double& magnitude) {
  const std::int64_t group = w.shape.k / w.shape.groups, act_groups = (x.k + kActGroup - 1) / kActGroup;
  for (std::int64_t k = 0; k < x.k;) {
    const std::int64_t end = std::min({x.k, (k / kActGroup + 1) * kActGroup, (k / group + 1) * group});
    const double scale = double{w.scale_of(n, k)} * r.scales[m * act_groups + k / kActGroup];
    std::int64_t sum = 0, absolute = 0;
    for (; k < end; ++k) {
      const std::int64_t code = r.codes[m * x.k + k], level = w.level(n, k);
      sum += level * code;
      absolute += (std::abs(level) + (1 << w.shape.bits)) * std::abs(code);
    }
    y += static_cast<double>(sum) * scale;
    magnitude += static_cast<double>(absolute) * scale;
  }
}

// Here, too, products of unsigned codes are the ones that round; and kernels move activations by up to 30 binary
// places, which those below 2^-96 feel.
void add_float(const Weight& w, const Activations& x, std::int64_t m, std::int64_t n, double& y, double& magnitude) {
  for (std::int64_t k = 0; k < x.k; ++k) {
    const double input = x.get(m, k), scale = w.scale_of(n, k);
    y += w.level(n, k) * scale * input;
    const int factor = std::abs(w.codes[n * x.k + k]) + std::abs(w.zero_of(n, k)) + (1 << w.shape.bits);
    magnitude += factor * scale * std::max(std::fabs(input), 0x1p-96);
  }
}

const cpu::MatmulKernel& kernel_of(const cpu::KernelTable& table, Compute mode) {
  return mode == Compute::int8 ? table.int8 : mode == Compute::int16 ? *table.int16 : table.floating;
}

}  // namespace

Activations::Activations(DType dtype, std::int64_t count, std::int64_t inputs)
    : rows(count), k(inputs), stride(inputs + 5), values(dtype, std::max<std::int64_t>(0, count * stride - 5)) {
  for (std::int64_t i = 0; i < values.size(); ++i) values.set(i, std::numeric_limits<float>::quiet_NaN());
}

TensorView Activations::view(std::int64_t count) const {
  TensorView out = values.matrix(count, k);
  out.strides[0] = stride;
  return out;
}

Activations normal_activations(Random& random, DType dtype, std::int64_t rows, std::int64_t k) {
  Activations out(dtype, rows, k);
  for (std::int64_t m = 0; m < rows; ++m)
    for (std::int64_t i = 0; i < k; ++i) out.set(m, i, random.normal());
  return out;
}

Expected expect(const Weight& w, const Activations& x, Compute compute, const std::vector<float>& bias) {
  const std::int64_t n = w.shape.n;
  Expected out{n, std::vector<double>(x.rows * n), std::vector<double>(x.rows * n)};
  const bool int8 = compute == Compute::int8;
  const Rounded rounded = int8 ? round_activations(x) : Rounded{};
  const std::vector<double> steps = compute == Compute::int16 ? int16_steps(x) : std::vector<double>{};
  const double roundings = int8 ? static_cast<double>(x.k) / 32 + 8 : static_cast<double>(x.k) + 56;
  for (std::int64_t m = 0; m < x.rows; ++m) {
    for (std::int64_t o = 0; o < n; ++o) {
      double y = 0.0, magnitude = 0.0;
      if (int8) {
        add_int8(w, x, rounded, m, o, y, magnitude);
      } else {
        add_float(w, x, m, o, y, magnitude);
      }
      y += bias.empty() ? 0.0 : bias[o];
      magnitude += bias.empty() ? 0.0 : std::fabs(bias[o]);
      out.y[m * n + o] = y;
      out.bound[m * n + o] = roundings * kEps * magnitude + storing(x.values.dtype(), y);
      if (compute == Compute::int16)
        for (std::int64_t k = 0; k < x.k; ++k)
          out.bound[m * n + o] += std::fabs(w.value(o, k)) * steps[m * x.k + k] / 2;
    }
  }
  return out;
}

Expected expect_exact(const Weight& w, const Activations& x, Compute compute) {
  const std::int64_t n = w.shape.n;
  Expected out = expect(w, x, compute == Compute::int8 ? Compute::floating : compute, {});
  if (compute != Compute::int8) return out;
  const Rounded rounded = round_activations(x);
  const std::int64_t act_groups = (x.k + kActGroup - 1) / kActGroup;
  for (std::int64_t m = 0; m < x.rows; ++m)
    for (std::int64_t o = 0; o < n; ++o)
      for (std::int64_t k = 0; k < x.k; ++k)
        out.bound[m * n + o] += std::fabs(w.value(o, k)) * rounded.scales[m * act_groups + k / kActGroup] / 2;
  return out;
}

std::string compare(const Expected& expected, const Floats& y, std::int64_t rows, std::int64_t n) {
  for (std::int64_t m = 0; m < rows; ++m) {
    for (std::int64_t o = 0; o < n; ++o) {
      const std::int64_t at = m * expected.n + o;
      const double value = y.get(m * n + o), error = std::fabs(value - expected.y[at]);
      if (!(error <= expected.bound[at])) {
        std::ostringstream text;
        text << "y[" << m << ", " << o << "] is " << value << ", expected " << expected.y[at] << " within "
             << expected.bound[at];
        return text.str();
      }
    }
  }
  return "";
}

struct alignas(64) Line {
  std::byte bytes[64];
};

Product run_kernel(const cpu::KernelTable& table, Compute compute, const Panels& weight, const Activations& x,
                   std::int64_t rows, const std::vector<float>& bias, Random& random) {
  constexpr float kSentinel = -1280.0f;
  const cpu::Layout& l = weight.layout;
  const cpu::MatmulKernel& kernel = kernel_of(table, compute);
  const DType dtype = x.values.dtype();
  // Rows that all begin on a cache line may be stored past the caches.
  const std::int64_t gap = random.integer(0, 1) ? 3 : round_up(l.n + 1, 16) - l.n;
  Floats guarded(dtype, rows * (l.n + gap));
  for (std::int64_t i = 0; i < guarded.size(); ++i) guarded.set(i, kSentinel);

  const std::size_t bytes = kernel.workspace_bytes(l, rows);
  const std::unique_ptr<std::byte, void (*)(void*)> workspace(
      static_cast<std::byte*>(std::aligned_alloc(64, (bytes + 64) / 64 * 64)), std::free);
  std::fill_n(workspace.get(), bytes, std::byte{0xff});  // leftovers of an earlier product
  std::vector<Line> scratch(kernel.scratch_bytes ? kernel.scratch_bytes(l, rows) / sizeof(Line) + 1 : 0);
  const cpu::MatmulArgs args{&l,
                             weight.bytes.data(),
                             rows,
                             {x.values.data(), dtype, x.stride},
                             workspace.get(),
                             bias.empty() ? nullptr : bias.data(),
                             {guarded.data(), dtype, l.n + gap},
                             reinterpret_cast<std::byte*>(scratch.data())};
  const auto cut = [&](std::int64_t size, std::int64_t unit) {
    return std::min(size, random.integer(0, static_cast<int>((size + unit - 1) / unit)) * unit);
  };
  const std::int64_t middle = cut(rows, kernel.row_tile), row_cut = cut(rows, kernel.row_tile);
  const std::int64_t panel_cut = cut(l.panels, 1);
  if (middle < rows) kernel.prepare(args, middle, rows);
  if (middle > 0) kernel.prepare(args, 0, middle);
  for (const auto& [p0, p1] : {std::pair{panel_cut, l.panels}, std::pair{std::int64_t{0}, panel_cut}})
    for (const auto& [m0, m1] : {std::pair{std::int64_t{0}, row_cut}, std::pair{row_cut, rows}})
      if (p0 < p1 && m0 < m1) kernel.run(args, p0, p1, m0, m1);

  Product out{Floats(dtype, rows * l.n), ""};
  for (std::int64_t m = 0; m < rows; ++m)
    for (std::int64_t o = 0; o < l.n + gap; ++o) {
      const float value = guarded.get(m * (l.n + gap) + o);
      if (o < l.n) {
        out.y.set(m * l.n + o, value);
      } else if (value != kSentinel) {
        out.overrun = "the gap after row " + std::to_string(m) + " was written";
      }
    }
  return out;
}

}  // namespace qtale::test

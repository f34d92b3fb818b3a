// Scalar kernels: the specification that every other kernel is tested against. Clear before fast.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <vector>

#include "core/scalar.h"
#include "cpu/kernels.h"
#include "cpu/solve.h"
#include "cpu/topk.h"
#include "qtale/decoder_ops.h"

namespace qtale::cpu {
namespace {

float load(const RowsIn& rows, std::int64_t r, std::int64_t i) {
  return load_scalar(rows.data, rows.dtype, r * rows.stride + i);
}

float epsilon(DType dtype) { return dtype == DType::f16 ? 0x1p-10f : dtype == DType::bf16 ? 0x1p-7f : FLT_EPSILON; }

// Stores a scale and returns it as stored; one that rounds to nothing codes its whole group as zeros.
float store_scale(void* scale, DType dtype, std::int64_t at, float wanted) {
  store_scalar(scale, dtype, at, wanted);
  if (load_scalar(scale, dtype, at) < FLT_MIN) store_scalar(scale, dtype, at, epsilon(dtype));
  return load_scalar(scale, dtype, at);
}

int code_of(float value, float scale, float zero_point, int num_bits) {
  const float half = static_cast<float>(1 << (num_bits - 1));
  const float code = std::nearbyint(value * (1.0f / scale)) + zero_point;
  return static_cast<int>(std::clamp(code, -half, half - 1.0f));
}

bool quantize_group(const QuantizeArgs& a, std::int64_t r, std::int64_t g) {
  const std::int64_t k0 = g * a.group_size;
  const std::int64_t at = r * a.groups + g;
  float lo = 0.0f, hi = 0.0f;
  for (std::int64_t i = 0; i < a.group_size; ++i) {
    const float w = load(a.weight, r, k0 + i);
    if (!std::isfinite(w)) return false;
    lo = std::min(lo, w);
    hi = std::max(hi, w);
  }
  const float levels = static_cast<float>((1 << a.num_bits) - 1);
  const float half = static_cast<float>(1 << (a.num_bits - 1));
  const float wanted = a.zero_point ? (hi - lo) / levels : std::max(-lo, hi) / (levels * 0.5f);
  const float scale = store_scale(a.scale, a.scale_dtype, at, wanted);
  if (!std::isfinite(scale)) return false;
  float zero_point = 0.0f;
  if (a.zero_point) {
    zero_point = std::clamp(std::nearbyint(-half - lo * (1.0f / scale)), -half, half - 1.0f);
    a.zero_point[at] = static_cast<std::int8_t>(zero_point);
  }
  for (std::int64_t i = 0; i < a.group_size; ++i)
    a.codes[r * a.in_features + k0 + i] =
        static_cast<std::int8_t>(code_of(load(a.weight, r, k0 + i), scale, zero_point, a.num_bits));
  return true;
}

std::int64_t quantize(const QuantizeArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r)
    for (std::int64_t g = 0; g < a.groups; ++g)
      if (!quantize_group(a, r, g)) return r;
  return -1;
}

void dequantize(const DequantizeArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    for (std::int64_t k = 0; k < a.in_features; ++k) {
      const std::int64_t at = r * a.groups + k / a.group_size;
      const float zero = a.zero_point ? static_cast<float>(a.zero_point[at]) : 0.0f;
      const float code = static_cast<float>(a.codes[r * a.in_features + k]);
      store_scalar(a.out.data, a.out.dtype, r * a.out.stride + k,
                   (code - zero) * load_scalar(a.scale, a.scale_dtype, at));
    }
  }
}

void fake_quantize(const FakeQuantizeArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    for (std::int64_t k = 0; k < a.in_features; ++k) {
      const std::int64_t at = r * a.groups + k / a.group_size;
      const float scale = load_scalar(a.scale, a.scale_dtype, at);
      const float zero = a.zero_point ? static_cast<float>(a.zero_point[at]) : 0.0f;
      const float x = load(a.x, r, k);
      const float value = std::isnan(x) ? x : (static_cast<float>(code_of(x, scale, zero, a.num_bits)) - zero) * scale;
      store_scalar(a.out.data, a.out.dtype, r * a.out.stride + k, value);
    }
  }
}

std::size_t no_workspace(const Layout&, std::int64_t) { return 0; }
void no_prepare(const MatmulArgs&, std::int64_t, std::int64_t) {}

struct Weight {
  int code;  // code - zero_point
  float scale;
};

Weight weight_at(const MatmulArgs& a, std::int64_t n, std::int64_t k) {
  const Layout& l = *a.layout;
  const std::uint8_t* panel = a.panels + n / l.panel_rows * l.panel_bytes;
  const std::int64_t row = n % l.panel_rows, block = k / l.block_k;
  const std::uint8_t* params = panel + l.param_offset(block);
  const int zero = l.symmetric ? 0 : static_cast<std::int8_t>(params[l.scale_bytes + row]);
  return {code_at(l, panel + l.block_offset(block), row, k % l.block_k) - zero,
          load_scalar(params, l.scale_dtype, row)};
}

// One output of the int8 mode: activations of each 128 inputs rounded to amax / 127, integer products per weight block.
// In the int16 mode what this leaves over is rounded likewise to a 254th of that scale.
template <int Planes>
float dot_rounded(const MatmulArgs& a, std::int64_t m, std::int64_t n) {
  const Layout& l = *a.layout;
  float y = 0.0f;
  for (std::int64_t g = 0; g < l.act_groups; ++g) {
    const std::int64_t begin = g * kActGroup, end = std::min(l.k, begin + kActGroup);
    float amax = 0.0f;
    for (std::int64_t k = begin; k < end; ++k) {
      const float x = std::fabs(load(a.x, m, k));
      if (!std::isfinite(x)) return std::numeric_limits<float>::quiet_NaN();
      amax = std::max(amax, x);
    }
    std::vector<float> left_over;
    for (std::int64_t k = begin; k < end; ++k) left_over.push_back(load(a.x, m, k));
    float scale = amax / 127.0f;
    for (int plane = 0; plane < Planes; ++plane, scale /= 254.0f) {
      const float inverse = scale >= FLT_MIN ? 1.0f / scale : 0.0f;
      float part = 0.0f;
      for (std::int64_t k0 = begin; k0 < end; k0 += l.block_k) {
        std::int32_t sum = 0;
        for (std::int64_t k = k0; k < std::min(end, k0 + l.block_k); ++k) {
          float& x = left_over[static_cast<std::size_t>(k - begin)];
          const float code = std::clamp(std::nearbyint(x * inverse), -127.0f, 127.0f);
          x = std::fma(code, -scale, x);
          sum += weight_at(a, n, k).code * static_cast<int>(code);
        }
        part += static_cast<float>(sum) * weight_at(a, n, k0).scale;
      }
      y += part * scale;
    }
  }
  return y;
}

// One output of the float mode.
float dot_float(const MatmulArgs& a, std::int64_t m, std::int64_t n) {
  const Layout& l = *a.layout;
  float y = 0.0f;
  for (std::int64_t k0 = 0; k0 < l.k; k0 += l.block_k) {
    float sum = 0.0f;
    for (std::int64_t k = k0; k < std::min(l.k, k0 + l.block_k); ++k)
      sum += static_cast<float>(weight_at(a, n, k).code) * load(a.x, m, k);
    y += sum * weight_at(a, n, k0).scale;
  }
  return y;
}

template <float (*Dot)(const MatmulArgs&, std::int64_t, std::int64_t)>
void matmul(const MatmulArgs& a, std::int64_t panel_begin, std::int64_t panel_end, std::int64_t row_begin,
            std::int64_t row_end) {
  const std::int64_t end = std::min(a.layout->n, panel_end * a.layout->panel_rows);
  for (std::int64_t m = row_begin; m < row_end; ++m)
    for (std::int64_t n = panel_begin * a.layout->panel_rows; n < end; ++n)
      store_scalar(a.y.data, a.y.dtype, m * a.y.stride + n, Dot(a, m, n) + (a.bias ? a.bias[n] : 0.0f));
}

std::size_t nothing_packed(std::int64_t, std::int64_t) { return 0; }
void no_pack(const ProjectArgs&, std::int64_t, std::int64_t) {}
std::size_t no_scratch(std::int64_t) { return 0; }

float as_it_is(float value) { return value; }
// What is no normal number counts as zero.
std::uint16_t to_bf16(float value) { return float_to_bf16(std::fabs(value) < FLT_MIN ? value * 0.0f : value); }
float as_bf16(float value) { return bf16_to_float(to_bf16(value)); }

// Where number i of an entry is.
std::int64_t place_of(std::int64_t stride, bool tiled, std::int64_t entry, std::int64_t i) {
  if (!tiled) return entry * stride + i;
  const std::int64_t tile = entry / kTileOutputs * kTileOutputs * stride + i / kTileInputs * kTileOutputs * kTileInputs;
  return tile + i % kTileInputs / 2 * 2 * kTileOutputs + entry % kTileOutputs * 2 + i % 2;
}

template <float (*Round)(float)>
float product(const ProjectArgs& a, const RowsIn& matrix, std::int64_t row, std::int64_t entry) {
  float sum = 0.0f;
  for (std::int64_t i = 0; i < a.depth; ++i)
    sum += Round(load(a.x, row, i)) *
           Round(load_scalar(matrix.data, matrix.dtype, place_of(matrix.stride, a.tiled, entry, i)));
  return sum;
}

template <float (*Round)(float)>
void find(const ProjectArgs& a, std::int64_t begin, std::int64_t end, std::byte*, Candidates& c) {
  for (std::int64_t entry = begin; entry < end; ++entry) {
    for (std::int64_t row = 0; row < a.rows; ++row) {
      const float sum = product<Round>(a, a.matrix, row, entry);
      if (!(sum <= c.thresholds[row])) offer(c, row, entry, sum);
    }
  }
}

template <float (*Round)(float)>
void store_products(const ProjectArgs& a, std::int64_t begin, std::int64_t end, std::byte*, const ProjectOut& out) {
  for (std::int64_t row = 0; row < a.rows; ++row)
    for (std::int64_t entry = begin; entry < end; ++entry) {
      const std::int64_t at = row * out.stride + entry;
      float y = product<Round>(a, a.matrix, row, entry) + (out.bias ? out.bias[entry] : 0.0f);
      if (a.up.data != nullptr) y = silu_scalar(y) * product<Round>(a, a.up, row, entry);
      if (out.rounded != nullptr) {
        out.rounded[at] = float_to_bf16(y);
      } else {
        out.y[at] = out.adds ? out.y[at] + y : y;
      }
    }
}

void round_weights(const RoundArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t entry = begin; entry < end; ++entry)
    for (std::int64_t i = 0; i < a.depth; ++i)
      a.out[place_of(a.depth, a.tiled, entry, i)] = to_bf16(load(a.matrix, entry, i));
}

void compact(const CompactArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r)
    for (std::int64_t i = 0; i < a.size; ++i) a.out[r * a.stride + i] = load(a.x, a.indices[r], i);
}

void scatter_add(const ScatterArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r)
    for (std::int64_t i = 0; i < a.size; ++i)
      a.x[a.indices[r] * a.stride + i] += (a.gates ? a.gates[r] : 1.0f) * a.delta[r * a.delta_stride + i];
}

// How many of the indices [0, size) come first of their kind and pass `counts`.
template <class Fn>
std::int64_t count_first(const std::int32_t* indices, std::int64_t size, Fn&& counts) {
  std::int64_t found = 0;
  for (std::int64_t i = 0; i < size; ++i)
    found += std::find(indices, indices + i, indices[i]) == indices + i && counts(indices[i]);
  return found;
}

double jaccard(const std::int32_t* a, std::int64_t a_size, const std::int32_t* b, std::int64_t b_size, std::int32_t*) {
  const auto in_a = [&](std::int32_t index) { return std::find(a, a + a_size, index) != a + a_size; };
  const std::int64_t common = count_first(b, b_size, in_a);
  const std::int64_t all = count_first(a, a_size, [](std::int32_t) { return true; }) +
                           count_first(b, b_size, [&](std::int32_t index) { return !in_a(index); });
  return all == 0 ? 1.0 : static_cast<double>(common) / static_cast<double>(all);
}

constexpr MatmulKernel kInt16 = {no_workspace, no_prepare, matmul<dot_rounded<2>>, 1, 264};

template <float (*Round)(float)>
constexpr ProjectKernel project = {nothing_packed, no_pack, no_scratch, find<Round>, store_products<Round>, 1, 64, 1};
constexpr ProjectKernel bf16_project = {
    nothing_packed, no_pack, no_scratch, find<as_bf16>, store_products<as_bf16>, 1, 64, 1, true, round_weights};

}  // namespace

const KernelTable reference_table = {
    "reference",
    16,
    quantize,
    dequantize,
    fake_quantize,
    {no_workspace, no_prepare, matmul<dot_rounded<1>>, 1, 264},
    &kInt16,
    {no_workspace, no_prepare, matmul<dot_float>, 1, 264},
    project<as_it_is>,
    &bf16_project,
    jaccard,
    compact,
    scatter_add,
    &reference_decoder_table,
    &reference_solve_table,
};

}  // namespace qtale::cpu

// Scalar kernels of a decoder block: the specification that every other kernel is tested against. Clear before fast.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/half.h"
#include "core/scalar.h"
#include "cpu/kv_entries.inl"

namespace qtale::cpu {
namespace {

void rms_norm_rows(const NormArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    for (std::int64_t h = 0; h < a.heads; ++h) {
      const float* x = a.x.at(r, h);
      float squares = 0.0f;
      for (std::int64_t i = 0; i < a.n; ++i) squares += x[i] * x[i];
      const float factor = 1.0f / std::sqrt(squares / static_cast<float>(a.n) + a.eps);
      float* out = a.out.at(r, h);
      for (std::int64_t i = 0; i < a.n; ++i) out[i] = x[i] * factor * a.weight[i];
    }
  }
}

void rope_rows(const RopeArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    const float* cosines = a.table + a.positions[r] * a.table_stride;
    const float* sines = cosines + a.half;
    for (std::int64_t h = 0; h < a.heads; ++h) {
      float* x = a.x.at(r, h);
      for (std::int64_t i = 0; i < a.half; ++i) {
        const float low = x[i], high = x[i + a.half];
        x[i] = low * cosines[i] - high * sines[i];
        x[i + a.half] = high * cosines[i] + low * sines[i];
      }
    }
  }
}

void silu_mul_rows(const SiluArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    const float* gate = a.gate_up + r * a.in_stride;
    for (std::int64_t i = 0; i < a.n; ++i) a.out[r * a.out_stride + i] = silu_scalar(gate[i]) * gate[a.n + i];
  }
}

ExpSum exp_sum_of(const float* x, std::int64_t n) {
  const float top = *std::max_element(x, x + n);
  double sum = 0.0;
  for (std::int64_t i = 0; i < n; ++i) sum += std::exp(static_cast<double>(x[i]) - static_cast<double>(top));
  return {top, sum};
}

// Element `at` of a KV head's keys or values, which begin at `part`.
float load_entry(const std::byte* part, DType dtype, std::int64_t at) {
  return dtype == DType::f32 ? reinterpret_cast<const float*>(part)[at]
                             : f16_to_float(reinterpret_cast<const std::uint16_t*>(part)[at]);
}

void store_entry(std::byte* part, DType dtype, std::int64_t at, float value) {
  if (dtype == DType::f32) {
    reinterpret_cast<float*>(part)[at] = value;
  } else {
    reinterpret_cast<std::uint16_t*>(part)[at] = float_to_f16(value);
  }
}

void append_units(const AppendArgs& a, std::int64_t begin, std::int64_t end) {
  for_entries(a, begin, end, [&](std::byte* part, std::int64_t slot, std::int64_t row, std::int64_t head) {
    for (std::int64_t d = 0; d < a.head_dim; ++d) {
      store_entry(part, a.dtype, d * kPageTokens + slot, a.k.at(row, head)[d]);
      store_entry(part + kv_values_at(a.head_dim, a.dtype), a.dtype, slot * a.head_dim + d, a.v.at(row, head)[d]);
    }
  });
}

// Numbers times the Hadamard matrix of Sylvester, rounded to 8 bits: codes times a scale, which is NaN where one of
// them is no finite number.
struct Rotated {
  std::vector<std::int32_t> codes;
  float scale = 0.0f;

  Rotated(const float* from, std::int64_t depth) {
    std::vector<float> x(from, from + depth);
    for (std::size_t step = 1; step < x.size(); step *= 2) {
      for (std::size_t i = 0; i < x.size(); ++i) {
        if ((i & step) != 0) continue;
        const float low = x[i], high = x[i + step];
        x[i] = low + high;
        x[i + step] = low - high;
      }
    }
    for (const float value : x) {
      if (!std::isfinite(value)) scale = std::numeric_limits<float>::quiet_NaN();
      scale = std::isnan(scale) ? scale : std::max(scale, std::fabs(value) / 127.0f);
    }
    const float inverse = scale >= std::numeric_limits<float>::min() ? 1.0f / scale : 0.0f;
    for (const float value : x)
      codes.push_back(inverse > 0.0f ? static_cast<std::int32_t>(std::nearbyint(value * inverse)) : 0);
  }
};

void append_int8_keys(const AppendArgs& a, std::int64_t begin, std::int64_t end) {
  for_entries(a, begin, end, [&](std::byte* part, std::int64_t slot, std::int64_t row, std::int64_t head) {
    const Rotated key(a.k.at(row, head), a.head_dim);
    for (std::int64_t d = 0; d < a.head_dim; ++d) {
      const std::int32_t code = key.codes[static_cast<std::size_t>(d)] + kKeyOffset;
      part[d / 4 * 4 * kPageTokens + 4 * slot + d % 4] = static_cast<std::byte>(code);
      store_entry(part + kv_values_at(a.head_dim, a.dtype), DType::f16, slot * a.head_dim + d, a.v.at(row, head)[d]);
    }
    reinterpret_cast<float*>(part + kPageTokens * a.head_dim)[slot] = key.scale;
  });
}

const std::byte* head_of(const AttentionArgs& a, const AttentionBlock& b, std::int64_t entry) {
  return static_cast<const std::byte*>(b.pages[entry / kPageTokens]) + b.kv_head * kv_head_bytes(a.head_dim, a.dtype);
}

float score(const AttentionArgs& a, const AttentionBlock& b, const float* q, std::int64_t entry) {
  const std::byte* keys = head_of(a, b, entry);
  const std::int64_t slot = entry % kPageTokens;
  float dot = 0.0f;
  for (std::int64_t d = 0; d < a.head_dim; ++d) dot += q[d] * load_entry(keys, a.dtype, d * kPageTokens + slot);
  return dot * a.scale;
}

float int8_score(const AttentionArgs& a, const AttentionBlock& b, const Rotated& q, std::int64_t entry) {
  const std::byte* keys = head_of(a, b, entry);
  const std::int64_t slot = entry % kPageTokens;
  std::int32_t dot = 0;
  for (std::int64_t d = 0; d < a.head_dim; ++d) {
    const auto code = static_cast<std::int32_t>(keys[d / 4 * 4 * kPageTokens + 4 * slot + d % 4]) - kKeyOffset;
    dot += q.codes[static_cast<std::size_t>(d)] * code;
  }
  const float scale = reinterpret_cast<const float*>(keys + kPageTokens * a.head_dim)[slot];
  return static_cast<float>(dot) * scale * (q.scale * (a.scale / static_cast<float>(a.head_dim)));
}

void attend(const AttentionArgs& a, const AttentionBlock& b, std::int64_t row, std::int64_t head) {
  const std::int64_t begin = a.begin[row], end = a.end[row];
  const float* q = a.q.at(row, head);
  const bool int8_keys = a.dtype == DType::s8;
  const Rotated rotated(q, int8_keys ? a.head_dim : 0);
  std::vector<float> weights;
  float top = -std::numeric_limits<float>::infinity(), total = 0.0f;
  for (std::int64_t j = begin; j < end; ++j) {
    weights.push_back(int8_keys ? int8_score(a, b, rotated, j) : score(a, b, q, j));
    top = std::max(top, weights.back());
  }
  for (float& weight : weights) {
    weight = std::exp(weight - top);
    total += weight;
  }
  for (std::int64_t d = 0; d < a.head_dim; ++d) {
    float sum = 0.0f;
    for (std::int64_t j = begin; j < end; ++j)
      sum +=
          weights[static_cast<std::size_t>(j - begin)] *
          load_entry(head_of(a, b, j) + kv_values_at(a.head_dim, a.dtype), a.dtype, j % kPageTokens * a.head_dim + d);
    a.out.at(row, head)[d] = begin < end ? sum / total : 0.0f;
  }
}

// All of it happens at the end, without states.
std::size_t nothing(const AttentionArgs&, std::int64_t) { return 0; }
void no_prepare(const AttentionArgs&, const AttentionBlock&, std::byte*) {}
void no_run(const AttentionArgs&, const AttentionBlock&, std::int64_t, std::int64_t, std::byte*, std::byte*) {}
void no_merge(const AttentionArgs&, const AttentionBlock&, std::byte*, const std::byte*) {}
void finish(const AttentionArgs& a, const AttentionBlock& b, const std::byte*) {
  for (std::int64_t i = 0; i < b.rows * a.group; ++i)
    attend(a, b, b.row + i / a.group, b.kv_head * a.group + i % a.group);
}

constexpr AttentionKernel kAttention = {64, nothing, nothing, no_prepare, no_run, no_merge, finish};

}  // namespace

const DecoderKernels reference_decoder_table = {
    rms_norm_rows, rope_rows, silu_mul_rows, exp_sum_of, append_units, kAttention, {kAttention, append_int8_keys},
};

}  // namespace qtale::cpu

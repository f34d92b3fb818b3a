// Scalar kernels of a decoder block: the specification that every other kernel is tested against. Clear before fast.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/half.h"
#include "cpu/decoder.h"

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
    for (std::int64_t i = 0; i < a.n; ++i) {
      const float x = gate[i], e = std::exp(-std::fabs(x));
      a.out[r * a.out_stride + i] = x * ((x < 0.0f ? e : 1.0f) / (1.0f + e)) * gate[a.n + i];
    }
  }
}

ExpSum exp_sum_of(const float* x, std::int64_t n) {
  const float top = *std::max_element(x, x + n);
  double sum = 0.0;
  for (std::int64_t i = 0; i < n; ++i) sum += std::exp(static_cast<double>(x[i]) - static_cast<double>(top));
  return {top, sum};
}

float load_entry(const void* page, DType dtype, std::int64_t at) {
  return dtype == DType::f16 ? f16_to_float(static_cast<const std::uint16_t*>(page)[at])
                             : static_cast<const float*>(page)[at];
}

void store_entry(void* page, DType dtype, std::int64_t at, float value) {
  if (dtype == DType::f16) {
    static_cast<std::uint16_t*>(page)[at] = float_to_f16(value);
  } else {
    static_cast<float*>(page)[at] = value;
  }
}

// Where a page holds element d of the key and of the value of an entry.
std::int64_t key_at(std::int64_t head, std::int64_t head_dim, std::int64_t entry, std::int64_t d) {
  return head * kv_head_elements(head_dim) + d * kPageTokens + entry % kPageTokens;
}
std::int64_t value_at(std::int64_t head, std::int64_t head_dim, std::int64_t entry, std::int64_t d) {
  return head * kv_head_elements(head_dim) + (kPageTokens + entry % kPageTokens) * head_dim + d;
}

void append_units(const AppendArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t first_page = a.first / kPageTokens;
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t page = first_page + unit / a.kv_heads, head = unit % a.kv_heads;
    for (std::int64_t r = 0; r < a.rows; ++r) {
      const std::int64_t entry = a.first + r;
      if (entry / kPageTokens != page) continue;
      for (std::int64_t d = 0; d < a.head_dim; ++d) {
        store_entry(a.pages[page], a.dtype, key_at(head, a.head_dim, entry, d), a.k.at(r, head)[d]);
        store_entry(a.pages[page], a.dtype, value_at(head, a.head_dim, entry, d), a.v.at(r, head)[d]);
      }
    }
  }
}

void attend(const AttentionArgs& a, const AttentionBlock& b, std::int64_t row, std::int64_t head) {
  const std::int64_t begin = a.begin[row], end = a.end[row];
  const float* q = a.q.at(row, head);
  std::vector<float> weights;
  float top = -std::numeric_limits<float>::infinity(), total = 0.0f;
  for (std::int64_t j = begin; j < end; ++j) {
    float dot = 0.0f;
    for (std::int64_t d = 0; d < a.head_dim; ++d)
      dot += q[d] * load_entry(b.pages[j / kPageTokens], a.dtype, key_at(b.kv_head, a.head_dim, j, d));
    weights.push_back(dot * a.scale);
    top = std::max(top, weights.back());
  }
  for (float& weight : weights) {
    weight = std::exp(weight - top);
    total += weight;
  }
  for (std::int64_t d = 0; d < a.head_dim; ++d) {
    float sum = 0.0f;
    for (std::int64_t j = begin; j < end; ++j)
      sum += weights[static_cast<std::size_t>(j - begin)] *
             load_entry(b.pages[j / kPageTokens], a.dtype, value_at(b.kv_head, a.head_dim, j, d));
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
    rms_norm_rows, rope_rows, silu_mul_rows, exp_sum_of, append_units, kAttention, kAttention,
};

}  // namespace qtale::cpu

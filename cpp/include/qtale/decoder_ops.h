// The operators of a decoder block beside the quantized product. Each checks its arguments (InputError).
// Activations are float32; "rows may be apart" means that only the last dimension has to be contiguous.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "qtale/ops.h"
#include "qtale/tensor.h"

namespace qtale {

// Weights that are not quantized lie as a matrix [out, in], or, for products of bfloat16 numbers where that pays (see
// has_tiles), in tiles: [out / 16, in / 32, 16, 32] bf16, contiguous, in which inputs 2 * i and 2 * i + 1 of output o
// of a tile are at [i, 2 * o] and the place after it.
inline constexpr std::int64_t kTileOutputs = 16, kTileInputs = 32;
inline bool is_tiled(const TensorView& weight) { return weight.rank == 4; }
inline std::int64_t outputs_of(const TensorView& weight) {
  return is_tiled(weight) ? weight.shape[0] * kTileOutputs : weight.shape[0];
}
inline std::int64_t inputs_of(const TensorView& weight) {
  return is_tiled(weight) ? weight.shape[1] * kTileInputs : weight.shape[1];
}

// Rounds a matrix [out, in] f32|f16|bf16, whose rows may be apart, to bfloat16 as products in bfloat16 do; `rounded`
// has rows without gaps or is tiled. Those products have the same bits. InputError for an odd number of inputs and
// where the kernels in use have no such products, or none of tiles.
void round_weights(const TensorView& matrix, const TensorView& rounded);

// y[m,o] = sum_i x[m,i] * weight[o,i] + bias[o], for weights that are not quantized.
//   x [m, in] f32, weight [out, in] f32|f16|bf16 or tiled, bias [out] f32 or nullptr, y [m, out] f32; rows of all may
//   be apart. Tiled weights and, where the CPU takes them, x in bf16 are for Compute::bfloat16. |y - y_exact| <= (in +
//   8) * 2^-24 * (sum_i |x_i * weight_i| + |bias|); NaN and infinity go where IEEE 754 sends them. Compute::bfloat16
//   rounds x and weight to bfloat16 first (the bound is that of the rounded ones, numbers below 2^-126 count as zero),
//   for an even number of inputs and where the CPU has such products, see has_bfloat16. A row of y depends on its row
//   of x alone, bit for bit, for any number of rows and threads.
void matmul(const TensorView& x, const TensorView& weight, const TensorView* bias, const TensorView& y,
            Compute compute = Compute::floating);
// y += x times weight, with the bits of matmul and an addition, without storing the product, where the CPU's kernels
// have that for so many rows; false and nothing done where not. Arguments and InputError as matmul.
bool matmul_add(const TensorView& x, const TensorView& weight, const TensorView& y, Compute compute);
// silu_mul of both products, whose bits it has, without storing them, where the CPU's kernels have that for so many
// rows; false and nothing done where not.
//   gate and up as weights of matmul, of one dtype and form, y [m, out] f32, or bf16, to which the bits of f32 are
//   rounded; rows of all may be apart. InputError as matmul.
bool gated_matmul(const TensorView& x, const TensorView& gate, const TensorView& up, const TensorView& y,
                  Compute compute);

// out = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich, 2019).
//   x and out [rows, n] or [rows, heads, n] f32, rows and heads may be apart; weight [n] f32; out may be x.
//   |out - exact| <= (n / 2 + 6) * 2^-24 * |exact|.
void rms_norm(const TensorView& x, const TensorView& weight, float eps, const TensorView& out);

// Rotary positions in the half-split form of HuggingFace models, in place (Su et al., 2021).
//   x [rows, heads, head_dim] f32, rows may be apart; table [positions, head_dim] f32 holds head_dim / 2 cosines and
//   then as many sines; positions [rows] s32, each below the rows of the table.
void rope(const TensorView& x, const TensorView& table, const TensorView& positions);

// out[r,i] = silu(gate_up[r,i]) * gate_up[r,n+i];  gate_up [rows, 2n] and out [rows, n] f32, rows may be apart.
//   |out - exact| <= 2^-21 * |exact| + 2^-118 * |gate_up[r,n+i]|.
void silu_mul(const TensorView& gate_up, const TensorView& out);

// What scoring needs of logits: log-softmax at one target, and whether the target is the first of the largest.
//   logits [rows, vocab] f32, rows may be apart; rows and targets [count] s32; log_probs [count] f32, greedy [count]
//   u8. |error| <= 2^-20 * (1 + |largest logit - target's|).
void log_softmax_at(const TensorView& logits, const TensorView& rows, const TensorView& targets,
                    const TensorView& log_probs, const TensorView& greedy);

// The logit of one target, and what was seen of its row.
struct TargetLogit {
  float value = 0.0F;
  float top = -std::numeric_limits<float>::infinity();
  double sum = 0.0;       // of e^(logit - top)
  bool is_first = false;  // nothing before the target is as large
};

// log_softmax_at of logits that come in pieces of the vocabulary, in order; a piece may be forgotten once it was added.
class LogSoftmax {
 public:
  LogSoftmax(const TensorView& rows, const TensorView& targets, std::int64_t vocab);
  // logits [rows, n] f32 of the next n entries.
  void add(const TensorView& logits);
  void finish(const TensorView& log_probs, const TensorView& greedy) const;

 private:
  std::vector<std::int32_t> rows_, targets_;
  std::vector<TargetLogit> state_;
  std::int64_t vocab_, seen_ = 0;
};

// Routed execution takes the rows that execute a block out of the residual stream and puts what the block adds back.
// out[i] = x[indices[i]] as f32;  x [rows, n] f32|f16|bf16, indices [count] s32, out [count, n] f32; rows may be apart.
void compact_rows(const TensorView& x, const TensorView& indices, const TensorView& out);
// x[indices[i]] += gates[i] * delta[i];  x [rows, n] and delta [count, n] f32, rows may be apart; gates [count] f32, or
// nullptr for ones; no index twice.
void scatter_add_rows(const TensorView& delta, const TensorView& indices, const TensorView* gates, const TensorView& x);

// The KV cache of a sequence in one layer is a list of pages of kPageTokens entries, f32 or f16. A page holds for each
// KV head the keys [head_dim][kPageTokens] and then the values [kPageTokens][head_dim]; pages are 64-byte aligned.
// A cache of s8 has keys of 8 bits and values of f16: a key k is kept as k' = H k / sqrt(head_dim), with the Hadamard
// matrix H, rounded to 127ths of its largest |k'_d|. That keeps scores, and spreads over all dimensions what is large
// in a few (Ashkboos et al., "QuaRot", 2024). Where that is, see has_int8_keys.
inline constexpr std::int64_t kPageTokens = 16;
// Whether the kernels in use have caches of s8, with heads of this size: a power of two from 16 to 256.
bool has_int8_keys(std::int64_t head_dim);
std::int64_t kv_page_bytes(std::int64_t kv_heads, std::int64_t head_dim, DType dtype);

// Stores rows as the entries first, first + 1, … of a list of pages; k and v [rows, kv_heads, head_dim] f32, rows may
// be apart.
void kv_append(const TensorView& k, const TensorView& v, std::span<void* const> pages, std::int64_t first, DType dtype);

// Consecutive rows of q that look at the same cache.
struct AttentionRun {
  std::int64_t row = 0;
  std::int64_t rows = 0;
  std::span<void* const> pages;
};

// out[r,h] = sum_j softmax_j(scale * q[r,h] . k[j, h / (heads / kv_heads)]) * v[j] over the entries
// begin[r] <= j < end[r]; zero where there is none.
//   q and out [rows, heads, head_dim] f32, rows may be apart; begin and end [rows] s32, neither falls within a run.
//   Runs ascend and do not overlap; rows of no run stay as they are. head_dim is even, up to 256.
//   Sums are float32: |out - exact| <= 2^-24 * (head_dim + entries + 64) * max |v| * (1 + 2 * max scale * |q| . |k|).
//   Compute::int8 and bfloat16 may round queries, keys, weights and values to bfloat16 where they multiply them, and do
//   with AVX-512 BF16, for any number of rows; then 2^-8 * max |v| * (5/4 + 9/8 * max scale * |q| . |k|) comes on top.
//   With AVX2 alone they round them to integers of 11 to 14 bits, with a scale for each query, key, value and 64
//   weights: a score moves by scale * (max |q| * sum |k| / 4000 + max |k| * sum |q| / 8000) at most, by m, and
//   max |v| * (5/4 * 2^-9 + e^(2m) - 1) comes on top. Queries and keys that are below 1e-30 throughout and
//   values below 2^-80 count as zero there, and heads whose size 8 does not divide stay in float32.
//   The others never do. With a cache of s8 each Compute rounds so, and queries to 8 bits as keys are:
//   a score moves by scale * (max |q'| * sum |k'| / 254) at most, beside what the rounding of keys does.
//   A row of out depends on its row of q and its entries alone, bit for bit.
void attention(const TensorView& q, std::span<const AttentionRun> runs, const TensorView& begin, const TensorView& end,
               std::int64_t kv_heads, DType dtype, float scale, const TensorView& out, Compute compute);

}  // namespace qtale

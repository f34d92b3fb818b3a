// The kernels of a decoder block beside the matrix products, and what the operators call to run them on all threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "qtale/decoder_ops.h"

namespace qtale::cpu {

inline constexpr std::int64_t kMaxHeadDim = 256;

// Float32 heads [rows, heads, n] whose last dimension is contiguous.
struct HeadsIn {
  const float* data;
  std::int64_t row_stride;
  std::int64_t head_stride;
  const float* at(std::int64_t row, std::int64_t head) const { return data + row * row_stride + head * head_stride; }
};
struct HeadsOut {
  float* data;
  std::int64_t row_stride;
  std::int64_t head_stride;
  float* at(std::int64_t row, std::int64_t head) const { return data + row * row_stride + head * head_stride; }
};

struct NormArgs {
  HeadsIn x;
  const float* weight;  // [n]
  float eps;
  HeadsOut out;
  std::int64_t heads;
  std::int64_t n;
};

struct RopeArgs {
  HeadsOut x;
  std::int64_t heads;
  std::int64_t half;  // head_dim / 2
  const float* table;
  std::int64_t table_stride;
  const std::int32_t* positions;
};

struct SiluArgs {
  const float* gate_up;
  std::int64_t in_stride;
  std::int64_t n;
  float* out;
  std::int64_t out_stride;
};

struct ExpSum {
  float top;
  double sum;
};

// Logits of entries [first, first + count).
struct SoftmaxArgs {
  const float* logits;
  std::int64_t stride;
  std::int64_t first;
  std::int64_t count;
  std::span<const std::int32_t> rows;
  std::span<const std::int32_t> targets;
};

struct AppendArgs {
  HeadsIn k;
  HeadsIn v;
  std::int64_t rows;
  std::int64_t kv_heads;
  std::int64_t head_dim;
  void* const* pages;
  std::int64_t first;
  DType dtype;
};

struct AttentionArgs {
  HeadsIn q;
  HeadsOut out;
  const std::int32_t* begin;
  const std::int32_t* end;
  std::int64_t group;  // query heads that share a KV head
  std::int64_t head_dim;
  DType dtype;
  float scale;
  Compute compute;
};

// Consecutive rows of q with the heads of one group. Query i of a block is head i % group of its row i / group.
struct AttentionBlock {
  void* const* pages;
  std::int64_t row;
  std::int64_t rows;
  std::int64_t kv_head;
};

// Softmax runs over spans of entries that begin at multiples of this; what the spans give is merged in their order. So
// threads may share a row and no bit depends on whether they do.
inline constexpr std::int64_t kAttentionSpan = 1024;

struct AttentionKernel {
  std::int64_t queries;  // of the blocks it likes best
  std::size_t (*state_bytes)(const AttentionArgs&, std::int64_t queries);
  std::size_t (*scratch_bytes)(const AttentionArgs&, std::int64_t queries);
  // Fills the scratch with what is of the block alone; any number of runs may follow.
  void (*prepare)(const AttentionArgs&, const AttentionBlock&, std::byte* scratch);
  // State of the block after the entries [begin, end) of one span alone.
  void (*run)(const AttentionArgs&, const AttentionBlock&, std::int64_t begin, std::int64_t end, std::byte* scratch,
              std::byte* state);
  // Adds to a state what later entries gave.
  void (*merge)(const AttentionArgs&, const AttentionBlock&, std::byte* state, const std::byte* later);
  void (*finish)(const AttentionArgs&, const AttentionBlock&, const std::byte* state);
};

// What may round more than float32 does.
struct RoundedKernels {
  AttentionKernel attention;  // of Compute::int8 and bfloat16, and of caches with keys of 8 bits
  // kv_append of those; nullptr where there are none.
  void (*append_int8_keys)(const AppendArgs&, std::int64_t begin, std::int64_t end);
};

// Kernels get checked arguments; [begin, end) are rows, and pairs of page and KV head of kv_append.
struct DecoderKernels {
  void (*rms_norm)(const NormArgs&, std::int64_t begin, std::int64_t end);
  void (*rope)(const RopeArgs&, std::int64_t begin, std::int64_t end);
  void (*silu_mul)(const SiluArgs&, std::int64_t begin, std::int64_t end);
  // The largest of x [n] and the sum of e^(x - largest).
  ExpSum (*exp_sum)(const float* x, std::int64_t n);
  void (*kv_append)(const AppendArgs&, std::int64_t begin, std::int64_t end);
  AttentionKernel attention;
  RoundedKernels rounded;
};

// Scalar: the specification of the others.
extern const DecoderKernels reference_decoder_table;
extern const DecoderKernels generic_decoder_table;
#ifdef QTALE_X86
extern const DecoderKernels avx2_decoder_table;
extern const DecoderKernels avx512_decoder_table;
extern const RoundedKernels avx512_bf16_rounded_table;
extern const AttentionKernel avx512_amx_attention_table;  // in place of that one's where the CPU has AMX
#endif

// Where the values of a KV head begin within its part of a page, and how long that part is, in bytes. Keys come first;
// those of 8 bits are codes [head_dim / 4][kPageTokens][4] and scales [kPageTokens] f32.
inline std::int64_t kv_values_at(std::int64_t head_dim, DType dtype) {
  const std::int64_t keys = kPageTokens * head_dim * size_of(dtype);
  return dtype == DType::s8 ? keys + kPageTokens * std::int64_t{sizeof(float)} : keys;
}
inline std::int64_t kv_head_bytes(std::int64_t head_dim, DType dtype) {
  return kv_values_at(head_dim, dtype) + kPageTokens * head_dim * size_of(dtype == DType::s8 ? DType::f16 : dtype);
}
constexpr std::int32_t kKeyOffset = 128;  // added to codes of keys, which makes them unsigned

void rms_norm(const NormArgs& args, std::int64_t rows);
void rope(const RopeArgs& args, std::int64_t rows);
void silu_mul(const SiluArgs& args, std::int64_t rows);
void add_logits(const SoftmaxArgs& args, std::span<TargetLogit> state);
void kv_append(const AppendArgs& args);
void attention(const AttentionArgs& args, std::span<const AttentionRun> runs, std::int64_t kv_heads);

}  // namespace qtale::cpu

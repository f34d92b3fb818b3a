// A decoder of the Llama family, described by data, over weights that the caller keeps alive.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "qtale/ops.h"
#include "qtale/tensor.h"

namespace qtale {

// One matrix: a prepacked u8 buffer, or weights of matmul. The bias is [out] f32.
struct Matrix {
  TensorView weight;
  std::optional<TensorView> bias;
};

// Matrices that read the same input, their outputs side by side.
using Projection = std::vector<Matrix>;

// Decides which tokens run a layer: logits = w2 . silu(rms_norm(w1 . x)), or w1 . x where w2 is absent; x is the raw
// residual that enters the layer. Two logits execute with the probability softmax(logits)[1], one with sigmoid(logit).
struct Router {
  TensorView w1;                    // [h, hidden] or [1, hidden] f32
  std::optional<TensorView> bias1;  // [h] or [1] f32
  std::optional<TensorView> norm;   // [h] f32
  std::optional<TensorView> w2;     // [2, h] f32
  std::optional<TensorView> bias2;  // [2] f32
  float norm_eps = 1e-6F;
};

enum class KvRule : std::uint8_t { evict, keep };

struct DecoderLayer {
  TensorView input_norm;             // [hidden] f32
  TensorView post_norm;              // [hidden] f32
  std::optional<TensorView> q_norm;  // [head_dim] f32
  std::optional<TensorView> k_norm;
  Projection qkv;  // outputs: queries, keys, values
  Projection o;
  Projection gate_up;  // outputs: gate, up
  Projection down;
  std::int64_t window = 0;  // tokens that a token sees, itself included; 0 for all
  std::optional<Router> router;
};

// Frequencies of rotary positions; `dynamic_*` describe the NTK scaling that grows with the length (0: none).
struct RopeSpec {
  std::vector<float> inv_freq;    // head_dim / 2
  float attention_factor = 1.0F;  // on cosines and sines
  double dynamic_base = 0.0;
  double dynamic_factor = 0.0;
  std::int64_t dynamic_length = 0;  // positions of the plain form
};

struct DecoderSpec {
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t vocab_size = 0;
  std::int64_t context = 0;  // most positions of a sequence
  float norm_eps = 1e-6F;
  float attention_scale = 0.0F;
  RopeSpec rope;
  Compute compute = Compute::int8;
  DType kv_dtype = DType::f16;  // f32, f16 or s8, see decoder_ops.h
  KvRule kv_rule = KvRule::evict;
  TensorView embedding;   // [vocab, hidden] f32|f16|bf16
  TensorView final_norm;  // [hidden] f32
  Matrix head;
  std::vector<DecoderLayer> layers;
};

// New tokens of one sequence. With a parent, the sequence must be empty and first takes over all that the parent holds,
// tokens of an earlier segment of the same call included.
struct Segment {
  std::int64_t sequence = 0;
  std::int64_t parent = -1;
  std::span<const std::int32_t> tokens;
  // Tokens of the whole text that this is a part of, which dynamic rotary positions go by; 0 where the text ends here.
  std::int64_t text_length = 0;
};

// What the last call did: tokens that entered, and by layer the rows (tokens of all segments in order) that executed.
struct CallReport {
  std::int64_t tokens = 0;
  std::vector<std::vector<std::int32_t>> executed;
};

struct Score {
  float log_prob = 0.0F;
  bool greedy = false;  // whether the target has the largest logit (the smallest index of equals)
};

// Sequences and their caches over one set of weights. Not thread-safe: callers take turns.
class Decoder {
 public:
  explicit Decoder(DecoderSpec spec);  // InputError where parts do not fit each other
  ~Decoder();
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  std::int64_t add_sequence();
  void remove_sequence(std::int64_t sequence);  // nothing happens where there is none
  std::int64_t length(std::int64_t sequence) const;
  // Forgets the tokens from position `length` on.
  void truncate(std::int64_t sequence, std::int64_t length);

  // Runs the tokens of all segments; logits [kept, vocab] f32 are those after the rows `keep`, which count the tokens
  // of all segments in order and ascend. `poll` is called between layers and between pieces of the head's product; when
  // it throws, the call is undone.
  void forward(std::span<const Segment> segments, std::span<const std::int64_t> keep, const TensorView& logits,
               const std::function<void()>& poll = {});
  // The same, giving only log-softmax at one target for each kept row; here a row may be kept several times.
  std::vector<Score> score(std::span<const Segment> segments, std::span<const std::int64_t> keep,
                           std::span<const std::int32_t> targets, const std::function<void()>& poll = {});

  // Routing: a token runs a routed layer when its probability is >= theta; the first `forced` tokens of a sequence
  // always do. With a depth set, layers outside of it are skipped by all tokens and those in it run.
  void set_theta(float theta);
  void set_forced_tokens(std::int64_t count);
  void set_depth(std::optional<std::vector<bool>> runs);
  void set_num_threads(int count);  // 0: as many as the process uses

  const CallReport& report() const;
  // Bytes that the routers of all layers read for a token: half for matrices that are rounded to bfloat16, which those
  // of layers are whose attention rounds, where the CPU multiplies such numbers.
  std::int64_t router_bytes() const;
  // Bytes of pages in use, by layer.
  std::vector<std::int64_t> kv_bytes() const;
  // The same of some sequences; a page that others hold too counts in parts.
  std::vector<std::int64_t> kv_bytes(std::span<const std::int64_t> sequences) const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace qtale

#include "engine/check_spec.h"

#include <cmath>
#include <string>
#include <string_view>

#include "core/text.h"
#include "engine/projection.h"
#include "ops/check.h"
#include "qtale/decoder_ops.h"

namespace qtale::engine {
namespace {

constexpr std::int64_t kMostSize = 1 << 30;
constexpr auto kOp = "Decoder";

void check_size(std::string_view name, std::int64_t value) {
  if (value < 1 || value > kMostSize) fail_input("Decoder: {} is {}; use 1 to {}.", name, value, kMostSize);
}

void check_vector(const std::string& name, const TensorView& t, std::int64_t size) {
  ops::check_dtype(kOp, name, t, DType::f32);
  ops::check_cpu(kOp, t);
  if (t.rank != 1 || t.shape[0] != size)
    fail_input("Decoder: {} has shape {}; expected [{}].", name, ops::shape_text(t), size);
  ops::check_contiguous(kOp, name, t);
}

void check_dense(const std::string& name, const TensorView& t, std::int64_t out, std::int64_t in) {
  ops::check_float(kOp, name, t);
  ops::check_cpu(kOp, t);
  ops::check_shape(kOp, name, t, out, in);
}

void check_matrix(const std::string& name, const Matrix& matrix, std::int64_t in) {
  const TensorView& weight = matrix.weight;
  if (weight.dtype == DType::u8) {
    ops::check_cpu(kOp, weight);
    const std::int64_t found = in_features(matrix);
    if (found != in) fail_input("Decoder: {} takes {} features; expected {}.", name, found, in);
  } else if (is_tiled(weight)) {
    ops::check_tiles(kOp, name, weight);
    if (inputs_of(weight) != in) fail_input("Decoder: {} takes {} features; expected {}.", name, inputs_of(weight), in);
  } else {
    if (weight.rank != 2) fail_input("Decoder: {} has shape {}; expected a matrix.", name, ops::shape_text(weight));
    check_dense(name, weight, weight.shape[0], in);
  }
  if (matrix.bias) check_vector(name + ".bias", *matrix.bias, out_features(matrix));
}

void check_projection(const std::string& name, const Projection& projection, std::int64_t out, std::int64_t in) {
  for (const Matrix& matrix : projection) check_matrix(name, matrix, in);
  const std::int64_t found = out_features(projection);
  if (found != out) fail_input("Decoder: {} has {} outputs; expected {}.", name, found, out);
}

void check_router(const std::string& name, const Router& router, std::int64_t hidden) {
  if (router.w1.rank != 2)
    fail_input("Decoder: {}.w1 has shape {}; expected a matrix.", name, ops::shape_text(router.w1));
  const std::int64_t width = router.w1.shape[0];
  ops::check_dtype(kOp, name + ".w1", router.w1, DType::f32);
  check_dense(name + ".w1", router.w1, width, hidden);
  if (router.bias1) check_vector(name + ".bias1", *router.bias1, width);
  if (!router.w2) {
    if (width != 1 || router.norm || router.bias2)
      fail_input("Decoder: {} has no second matrix, so it takes one of shape [1, {}] and no norm.", name, hidden);
    return;
  }
  if (router.norm) check_vector(name + ".norm", *router.norm, width);
  ops::check_dtype(kOp, name + ".w2", *router.w2, DType::f32);
  check_dense(name + ".w2", *router.w2, 2, width);
  if (router.bias2) check_vector(name + ".bias2", *router.bias2, 2);
}

void check_layer(const std::string& name, const DecoderLayer& layer, const DecoderSpec& spec) {
  const std::int64_t hidden = spec.hidden_size, queries = spec.num_heads * spec.head_dim;
  check_vector(name + ".input_norm", layer.input_norm, hidden);
  check_vector(name + ".post_norm", layer.post_norm, hidden);
  if (layer.q_norm) check_vector(name + ".q_norm", *layer.q_norm, spec.head_dim);
  if (layer.k_norm) check_vector(name + ".k_norm", *layer.k_norm, spec.head_dim);
  check_projection(name + ".qkv", layer.qkv, queries + 2 * spec.num_kv_heads * spec.head_dim, hidden);
  check_projection(name + ".o", layer.o, hidden, queries);
  check_projection(name + ".gate_up", layer.gate_up, 2 * spec.intermediate_size, hidden);
  check_projection(name + ".down", layer.down, hidden, spec.intermediate_size);
  if (layer.window < 0) fail_input("Decoder: {}.window is {}; use 0 for all tokens or a length.", name, layer.window);
  if (layer.router) check_router(name + ".router", *layer.router, hidden);
}

void check_rope(const RopeSpec& rope, std::int64_t head_dim) {
  if (std::ssize(rope.inv_freq) * 2 != head_dim)
    fail_input("Decoder: inv_freq has {} values; head_dim {} takes half of it.", rope.inv_freq.size(), head_dim);
  for (const float frequency : rope.inv_freq)
    if (!std::isfinite(frequency)) fail_input("Decoder: inv_freq holds {}; all must be finite.", frequency);
  if (rope.dynamic_length > 0 && !(rope.dynamic_base > 0.0 && rope.dynamic_factor >= 1.0 && head_dim > 2))
    fail_input("Decoder: dynamic rope has base {} and factor {}; expected a positive base and a factor from 1 on.",
               rope.dynamic_base, rope.dynamic_factor);
}

}  // namespace

void check_spec(const DecoderSpec& spec) {
  check_size("hidden_size", spec.hidden_size);
  check_size("intermediate_size", spec.intermediate_size);
  check_size("num_heads", spec.num_heads);
  check_size("num_kv_heads", spec.num_kv_heads);
  check_size("head_dim", spec.head_dim);
  check_size("vocab_size", spec.vocab_size);
  check_size("context", spec.context);
  if (spec.num_heads % spec.num_kv_heads != 0)
    fail_input("Decoder: {} heads do not share {} key-value heads evenly.", spec.num_heads, spec.num_kv_heads);
  if (spec.kv_dtype != DType::f32 && spec.kv_dtype != DType::f16 && spec.kv_dtype != DType::s8)
    fail_input("Decoder: kv_dtype is {}; use float32, float16 or int8.", name_of(spec.kv_dtype));
  if (spec.kv_dtype == DType::s8 && !has_int8_keys(spec.head_dim))
    fail_input("Decoder: the kernels in use have no keys of 8 bits with a head_dim of {}; use kv_dtype float16.",
               spec.head_dim);
  if (!(spec.norm_eps >= 0.0F) || !std::isfinite(spec.attention_scale))
    fail_input("Decoder: norm_eps is {} and attention_scale {}; both must be finite numbers.", spec.norm_eps,
               spec.attention_scale);
  check_rope(spec.rope, spec.head_dim);
  check_dense("embedding", spec.embedding, spec.vocab_size, spec.hidden_size);
  check_vector("final_norm", spec.final_norm, spec.hidden_size);
  check_projection("head", {spec.head}, spec.vocab_size, spec.hidden_size);
  if (spec.layers.empty()) fail_input("Decoder: there are no layers; give at least one.");
  for (std::size_t i = 0; i < spec.layers.size(); ++i) check_layer("layer " + std::to_string(i), spec.layers[i], spec);
}

}  // namespace qtale::engine

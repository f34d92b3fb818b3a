#include "tiny_decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "qtale/decoder_ops.h"

namespace qtale::test {
namespace {

constexpr std::int64_t kHeadDim = 16;

}  // namespace

TensorView TinyDecoder::vector(std::int64_t size, float mean, float sigma) {
  Floats& values = floats_.emplace_back(DType::f32, size);
  for (std::int64_t i = 0; i < size; ++i) values.set(i, mean + sigma * random_.normal());
  return values.vector();
}

TensorView TinyDecoder::dense(std::int64_t rows, std::int64_t cols, DType dtype, float sigma) {
  return floats_.emplace_back(normal_floats(random_, dtype, rows * cols, sigma)).matrix(rows, cols);
}

TensorView TinyDecoder::tiled(const TensorView& matrix) {
  TensorView tiles = floats_.emplace_back(DType::bf16, matrix.numel()).matrix(matrix.shape[0], matrix.shape[1]);
  const std::int64_t across = matrix.shape[1] / kTileInputs, tile = kTileOutputs * kTileInputs;
  tiles.rank = 4;
  tiles.shape = {matrix.shape[0] / kTileOutputs, across, kTileOutputs, kTileInputs};
  tiles.strides = {across * tile, tile, kTileInputs, 1};
  round_weights(matrix, tiles);
  return tiles;
}

Matrix TinyDecoder::matrix(std::int64_t out, std::int64_t in, int num_bits) {
  const float sigma = 1.0F / std::sqrt(static_cast<float>(in));
  if (!options_.packed) {
    const TensorView weight = dense(out, in, options_.dense_dtype, sigma);
    Matrix made{options_.tiled ? tiled(weight) : weight, std::nullopt};
    if (options_.biases) made.bias = vector(out, 0.0F, 0.1F);
    return made;
  }
  const Floats weight = normal_floats(random_, DType::f32, out * in, sigma);
  packed_.push_back(prepacked(quantized(weight, {out, in, in / 32, num_bits, true, DType::f16})));
  return {view(packed_.back()), std::nullopt};
}

Router TinyDecoder::router(std::int64_t width) {
  Router router;
  router.w1 = dense(width, hidden_, DType::f32, 0.3F);
  if (width == 1) return router;
  router.bias1 = vector(width, 0.0F, 0.1F);
  router.norm = vector(width, 1.0F, 0.1F);
  router.w2 = dense(2, width, DType::f32, 1.0F);
  router.bias2 = vector(2, 0.0F, 0.1F);
  return router;
}

TinyDecoder::TinyDecoder(const Options& options)
    : options_(options), hidden_(96 * options.scale), random_(options.seed) {
  const std::int64_t between = 160 * options.scale, heads = 6 * options.scale, kv_heads = 2 * options.scale;
  spec_.hidden_size = hidden_;
  spec_.intermediate_size = between;
  spec_.num_heads = heads;
  spec_.num_kv_heads = kv_heads;
  spec_.head_dim = kHeadDim;
  spec_.vocab_size = options.vocab;
  spec_.context = 128;
  spec_.attention_scale = 0.25F;
  spec_.kv_dtype = options.kv_dtype;
  spec_.kv_rule = options.kv_rule;
  for (int i = 0; i < kHeadDim / 2; ++i) spec_.rope.inv_freq.push_back(std::pow(10.0F, -0.5F * static_cast<float>(i)));
  spec_.embedding = dense(options.vocab, hidden_, DType::f16, 1.0F);
  spec_.final_norm = vector(hidden_, 1.0F, 0.1F);
  for (std::size_t i = 0; i < options.layers; ++i) {
    DecoderLayer layer;
    layer.input_norm = vector(hidden_, 1.0F, 0.1F);
    layer.post_norm = vector(hidden_, 1.0F, 0.1F);
    if (i == 1) layer.q_norm = layer.k_norm = vector(kHeadDim, 1.0F, 0.1F);
    const std::int64_t queries = heads * kHeadDim, keys = kv_heads * kHeadDim;
    layer.qkv = {matrix(queries, hidden_, 4), matrix(2 * keys, hidden_, 8)};
    layer.o = {matrix(hidden_, queries, 4)};
    layer.gate_up = {matrix(2 * between, hidden_, 3)};
    layer.down = {matrix(hidden_, between, 4)};
    layer.window = options.window;
    if (options.routers && i > 0) layer.router = router(i == 1 ? 7 : 1);
    spec_.layers.push_back(layer);
  }
  spec_.head = matrix(options.vocab, hidden_, 8);
}

std::vector<std::int64_t> counts(const CallReport& report) {
  std::vector<std::int64_t> counts;
  for (const auto& rows : report.executed) counts.push_back(std::ssize(rows));
  return counts;
}

std::vector<std::int32_t> random_tokens(std::uint64_t seed, std::size_t count) {
  Random random(seed);
  std::vector<std::int32_t> tokens(count);
  for (std::int32_t& token : tokens) token = random.integer(0, kVocab - 1);
  return tokens;
}

Logits run(Decoder& decoder, const std::vector<Segment>& segments) {
  std::size_t rows = 0;
  for (const Segment& segment : segments) rows += segment.tokens.size();
  std::vector<std::int64_t> keep(rows);
  std::iota(keep.begin(), keep.end(), 0);
  Logits out{static_cast<std::int64_t>(rows), Lines<float>(rows * kVocab)};
  decoder.forward(segments, keep, TensorView::matrix(out.values.data(), DType::f32, out.rows, kVocab));
  return out;
}

Logits run_alone(Decoder& decoder, std::span<const std::int32_t> tokens, std::size_t chunk) {
  const std::int64_t sequence = decoder.add_sequence();
  Logits all;
  for (std::size_t begin = 0; begin < tokens.size(); begin += chunk) {
    const Logits part = run(decoder, {{sequence, -1, tokens.subspan(begin, std::min(chunk, tokens.size() - begin))}});
    all.rows += part.rows;
    all.values.insert(all.values.end(), part.values.begin(), part.values.end());
  }
  decoder.remove_sequence(sequence);
  return all;
}

std::int64_t different_rows(const Logits& a, std::int64_t begin, const Logits& b, std::int64_t b_begin,
                            std::int64_t count) {
  std::int64_t different = 0;
  for (std::int64_t r = 0; r < count; ++r)
    different += std::memcmp(a.row(begin + r), b.row(b_begin + r), kVocab * sizeof(float)) != 0;
  return different;
}

}  // namespace qtale::test

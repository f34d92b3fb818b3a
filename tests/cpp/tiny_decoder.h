// A small random decoder for tests, with matrices of all kinds.
#pragma once

#include <deque>

#include "qtale/engine.h"
#include "support.h"

namespace qtale::test {

inline constexpr std::int64_t kVocab = 61;

class TinyDecoder {
 public:
  struct Options {
    std::uint64_t seed = 1;
    std::size_t layers = 3;
    bool packed = true;    // int8 products with packed matrices, else dense ones
    bool routers = false;  // on all layers but the first
    KvRule kv_rule = KvRule::evict;
    std::int64_t window = 0;
    DType kv_dtype = DType::f32;
    std::int64_t scale = 1;       // times the widths; from 4 on a hundred tokens are work for several threads
    std::int64_t vocab = kVocab;  // run() takes kVocab alone
    // Of dense matrices; those in tiles are bf16 and need a vocab of whole tiles.
    DType dense_dtype = DType::f16;
    bool biases = true;
    bool tiled = false;
  };

  explicit TinyDecoder(const Options& options);

  const DecoderSpec& spec() const { return spec_; }

 private:
  TensorView vector(std::int64_t size, float mean, float sigma);
  TensorView dense(std::int64_t rows, std::int64_t cols, DType dtype, float sigma);
  TensorView tiled(const TensorView& matrix);
  Matrix matrix(std::int64_t out, std::int64_t in, int num_bits);
  Router router(std::int64_t width);

  Options options_;
  std::int64_t hidden_;
  Random random_;
  std::deque<Floats> floats_;
  std::deque<std::vector<std::uint8_t>> packed_;
  DecoderSpec spec_;
};

// Rows of logits.
struct Logits {
  std::int64_t rows = 0;
  Lines<float> values;
  const float* row(std::int64_t r) const { return values.data() + r * kVocab; }
};

// Tokens that executed, by layer.
std::vector<std::int64_t> counts(const CallReport& report);
std::vector<std::int32_t> random_tokens(std::uint64_t seed, std::size_t count);
// Logits after all tokens of the segments.
Logits run(Decoder& decoder, const std::vector<Segment>& segments);
// Logits of one new sequence, given in pieces of `chunk` tokens.
Logits run_alone(Decoder& decoder, std::span<const std::int32_t> tokens, std::size_t chunk = 1000);
// Number of rows [begin, begin + count) of a that are not, bit for bit, rows [0, count) of b.
std::int64_t different_rows(const Logits& a, std::int64_t begin, const Logits& b, std::int64_t b_begin,
                            std::int64_t count);

}  // namespace qtale::test

// Choosing tokens from logits: greedy, or drawn after the usual filters in transformers' order.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "qtale/tensor.h"

namespace qtale {

// How tokens are chosen. Filters apply in this order: repetition_penalty (Keskar et al., 2019; also when greedy),
// temperature, top_k, top_p (Holtzman et al., 2020), min_p.
struct SamplingOptions {
  double temperature = 0.0;  // 0, also as float32: the largest logit, the first of equals
  std::int64_t top_k = 0;    // those that are no less than the k-th largest; 0: off
  double top_p = 1.0;        // the fewest most likely ones that reach it, the larger index first of equals; 1: off
  double min_p = 0.0;        // those of at least this share of the largest probability; 0: off
  double repetition_penalty = 1.0;  // logits of seen tokens are divided by it, negative ones multiplied; 1: off
};

// Philox4x64-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): numbers that are a function of
// the key and of how many were drawn, those of numpy.random.Generator(numpy.random.Philox(key=[seed, index])).random().
class Philox {
 public:
  using Key = std::array<std::uint64_t, 2>;
  using Block = std::array<std::uint64_t, 4>;

  Philox(std::uint64_t seed, std::uint64_t index) : key_{seed, index} {}
  static Block block(Block counter, Key key);
  double uniform();  // in [0, 1), 53 bits

 private:
  Key key_;
  Block block_{};
  std::uint64_t drawn_ = 0;
};

// What the choice of a sequence's next token depends on beside its logits: its own random numbers and its tokens. Not
// thread-safe.
class TokenSource {
 public:
  TokenSource(std::uint64_t seed, std::uint64_t index) : random_(seed, index) {}
  void see(std::span<const std::int64_t> tokens);
  // Each token once.
  std::span<const std::int32_t> seen() const { return seen_; }
  double uniform() { return random_.uniform(); }

 private:
  Philox random_;
  std::vector<std::int32_t> seen_;
  std::vector<bool> is_seen_;
};

// The next token of each row of logits [n, vocab] f32, of which the penalty overwrites some. A row takes one number of
// its source, none when greedy, and what is chosen depends on nothing but the row, its source and the options.
// Throws Error where the largest logit is no finite number, or one is NaN.
std::vector<std::int32_t> sample(const TensorView& logits, std::span<const std::shared_ptr<TokenSource>> sources,
                                 const SamplingOptions& options);

}  // namespace qtale

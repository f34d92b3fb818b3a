// Scores of a decoder: log-softmax of its logits, for few rows and for many over a vocabulary in pieces.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <vector>

#include "catch.h"
#include "tiny_decoder.h"

namespace qtale::test {
namespace {

void check_scores(std::span<const Score> scores, const float* logits, std::int64_t vocab,
                  std::span<const std::int64_t> keep, std::span<const std::int32_t> targets) {
  double worst = 0.0;
  std::int64_t wrong = 0;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    const float* values = logits + keep[i] * vocab;
    double sum = 0.0;
    for (std::int64_t v = 0; v < vocab; ++v) sum += std::exp(double{values[v]});
    worst = std::max(worst, std::abs(double{scores[i].log_prob} - (double{values[targets[i]]} - std::log(sum))));
    wrong += scores[i].greedy != (std::max_element(values, values + vocab) - values == targets[i]);
  }
  CHECK(worst < 1e-5);
  CHECK(wrong == 0);
}

}  // namespace

TEST_CASE("scores are log-softmax of the logits", "[decoder]") {
  const TinyDecoder model({});
  Decoder decoder(model.spec());
  const auto tokens = random_tokens(8, 90);
  const Logits logits = run_alone(decoder, tokens);
  std::vector<std::int64_t> keep;
  std::vector<std::int32_t> targets;
  for (std::int64_t row = 0; row < 90; ++row)
    for (int again = 0; again <= row % 3; ++again) {
      const float* values = logits.row(row);
      keep.push_back(row);
      targets.push_back(again == 2 ? static_cast<std::int32_t>(std::max_element(values, values + kVocab) - values)
                                   : static_cast<std::int32_t>((row + 11 * again) % kVocab));
    }
  const std::int64_t sequence = decoder.add_sequence();
  const auto scores = decoder.score(std::vector<Segment>{{sequence, -1, tokens}}, keep, targets);
  check_scores(scores, logits.values.data(), kVocab, keep, targets);
}

TEST_CASE("scores of many rows over a vocabulary in pieces are log-softmax of the logits", "[decoder]") {
  constexpr std::int64_t kSequences = 6, kTokens = 100, kRows = kSequences * kTokens, kLarge = 5000;
  const TinyDecoder model({.layers = 1, .packed = false, .vocab = kLarge});
  Decoder decoder(model.spec());
  const auto tokens = random_tokens(12, kRows);
  const auto segments = [&](std::int64_t count) {
    std::vector<Segment> out;
    for (std::int64_t s = 0; s < count; ++s)
      out.push_back(
          {decoder.add_sequence(), -1, std::span(tokens).subspan(static_cast<std::size_t>(s * kTokens), kTokens)});
    return out;
  };
  std::vector<std::int64_t> keep(kRows);
  std::iota(keep.begin(), keep.end(), 0);
  Lines<float> logits(kRows * kLarge);
  decoder.forward(segments(kSequences), keep, TensorView::matrix(logits.data(), DType::f32, kRows, kLarge));
  std::vector<std::int32_t> targets;
  for (std::int64_t row = 0; row < kRows; ++row) {
    const float* values = logits.data() + row * kLarge;
    const auto top = static_cast<std::int32_t>(std::max_element(values, values + kLarge) - values);
    targets.push_back(row % 3 == 0 ? top : static_cast<std::int32_t>(row * 37 % kLarge));
  }
  const auto scores = decoder.score(segments(kSequences), keep, targets);
  check_scores(scores, logits.data(), kLarge, keep, targets);

  const std::vector<std::int64_t> some(keep.begin(), keep.begin() + 7);
  const auto few = decoder.score(segments(1), some, std::span(targets).first(7));
  for (std::size_t i = 0; i < few.size(); ++i) CHECK(few[i].log_prob == scores[i].log_prob);
}

}  // namespace qtale::test

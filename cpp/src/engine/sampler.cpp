#include "qtale/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/text.h"
#include "engine/token_choice.h"
#include "ops/check.h"
#include "qtale/parallel.h"

namespace qtale {
namespace {

constexpr auto kOp = "sample";
// Logits below which waking the threads costs more than it brings.
constexpr std::int64_t kGrain = 32768;
constexpr std::int64_t kMostTokens = std::numeric_limits<std::int32_t>::max();

// The upper half of a * b, and the lower one in `low`.
__extension__ using Wide = unsigned __int128;
std::uint64_t multiply(std::uint64_t a, std::uint64_t b, std::uint64_t& low) {
  const Wide product = Wide{a} * b;
  low = static_cast<std::uint64_t>(product);
  return static_cast<std::uint64_t>(product >> 64);
}

void check(std::string_view name, double value, bool fits, std::string_view accepted) {
  if (!fits || !std::isfinite(value))
    fail_input("sample: {} {} is not accepted; it must be {}.", name, value, accepted);
}

void check(const SamplingOptions& options) {
  check("temperature", options.temperature, options.temperature >= 0.0, "0 (greedy) or more");
  if (options.top_k < 0) fail_input("sample: top_k {} is not accepted; it must be 0 (off) or more.", options.top_k);
  check("top_p", options.top_p, options.top_p > 0.0 && options.top_p <= 1.0, "above 0 and at most 1");
  check("min_p", options.min_p, options.min_p >= 0.0 && options.min_p <= 1.0, "from 0 to 1");
  check("repetition_penalty", options.repetition_penalty,
        options.repetition_penalty >= 1e-30 && options.repetition_penalty <= 1e30, "from 1e-30 to 1e30");
}

void check(const TensorView& logits, std::span<const std::shared_ptr<TokenSource>> sources) {
  ops::check_matrix(kOp, "logits", logits, DType::f32);
  ops::check_contiguous(kOp, "logits", logits);
  const std::int64_t rows = logits.shape[0], vocab = logits.shape[1];
  if (rows > 0 && (vocab < 1 || vocab > kMostTokens))
    fail_input("sample: logits has shape {}; expected rows of 1 to {} tokens.", ops::shape_text(logits), kMostTokens);
  if (rows != std::ssize(sources)) fail_input("sample: logits has {} rows for {} sources.", rows, sources.size());
  if (std::any_of(sources.begin(), sources.end(), [](const auto& source) { return source == nullptr; }))
    fail_input("sample: a source is missing; give one for each row.");
}

void penalize(std::span<float> logits, std::span<const std::int32_t> seen, double penalty) {
  const float factor = engine::nearest_float(penalty);
  for (const std::int32_t token : seen) {
    if (token >= std::ssize(logits))
      fail_input("sample: token {} was seen, but logits are of {} tokens.", token, logits.size());
    float& logit = logits[static_cast<std::size_t>(token)];
    logit = logit < 0.0F ? logit * factor : logit / factor;
  }
}

}  // namespace

Philox::Block Philox::block(Block counter, Key key) {
  for (int round = 0; round < 10; ++round) {
    std::uint64_t low0 = 0, low1 = 0;
    const std::uint64_t high0 = multiply(0xD2E7470EE14C6C93, counter[0], low0);
    const std::uint64_t high1 = multiply(0xCA5A826395121157, counter[2], low1);
    counter = {high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0};
    key[0] += 0x9E3779B97F4A7C15;
    key[1] += 0xBB67AE8584CAA73B;
  }
  return counter;
}

double Philox::uniform() {
  const std::uint64_t place = drawn_++ % 4;
  // The first block is that of counter 1, as numpy has it.
  if (place == 0) block_ = block({drawn_ / 4 + 1, 0, 0, 0}, key_);
  return static_cast<double>(block_[place] >> 11) * 0x1p-53;
}

void TokenSource::see(std::span<const std::int64_t> tokens) {
  for (const std::int64_t token : tokens) {
    if (token < 0 || token >= kMostTokens) fail_input("TokenSource: {} is no token; use 0 and more.", token);
    const auto at = static_cast<std::size_t>(token);
    if (at >= is_seen_.size()) is_seen_.resize(at + 1);
    if (is_seen_[at]) continue;
    is_seen_[at] = true;
    seen_.push_back(static_cast<std::int32_t>(token));
  }
}

std::vector<std::int32_t> sample(const TensorView& logits, std::span<const std::shared_ptr<TokenSource>> sources,
                                 const SamplingOptions& options) {
  check(options);
  check(logits, sources);
  const auto vocab = static_cast<std::size_t>(logits.shape[1]);
  std::vector<double> uniforms(sources.size());
  // Here, and not by the threads: rows may share a source.
  if (engine::nearest_float(options.temperature) != 0.0F)
    std::transform(sources.begin(), sources.end(), uniforms.begin(), [](const auto& each) { return each->uniform(); });
  std::vector<std::int32_t> tokens(sources.size());
  const std::int64_t grain = std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, logits.shape[1]));
  parallel_for(logits.shape[0], grain, [&](std::int64_t begin, std::int64_t end) {
    thread_local engine::TokenChoice choice;
    for (auto row = static_cast<std::size_t>(begin); row < static_cast<std::size_t>(end); ++row) {
      const std::span<float> values(logits.as<float>() + row * vocab, vocab);
      if (options.repetition_penalty != 1.0) penalize(values, sources[row]->seen(), options.repetition_penalty);
      tokens[row] = choice.choose(values, options, uniforms[row]);
    }
  });
  return tokens;
}

}  // namespace qtale

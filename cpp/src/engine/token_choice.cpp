#include "engine/token_choice.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "ops/exp_sum.h"
#include "qtale/error.h"

namespace qtale::engine {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr std::size_t kBlock = 32;    // logits whose largest is kept
constexpr std::size_t kWide = 512;    // the same where only the largest of all is wanted
constexpr std::size_t kChunk = 1024;  // logits whose sum is kept
constexpr std::size_t kLikely = 256;  // top_p looks at about as many first, then at kMore times as many
constexpr std::size_t kMore = 4;
constexpr std::size_t kFew = 64;  // fewer are sorted

float larger(float a, float b) { return a > b ? a : b; }

// Four numbers of any CPU; compilers make poor code of plain loops for the largest number and for NaN.
using Quad = float __attribute__((vector_size(16)));
using QuadMask = std::int32_t __attribute__((vector_size(16)));

Quad larger(Quad a, Quad b) { return a > b ? a : b; }

// The largest of `Size` numbers, or NaN where one is.
template <std::size_t Size>
float max_of_block(const float* x) {
  constexpr std::size_t kQuads = 4;
  Quad largest[kQuads], next[kQuads];
  std::memcpy(largest, x, sizeof largest);
  QuadMask unordered{};
  for (std::size_t i = 0; i < Size; i += 4 * kQuads) {
    std::memcpy(next, x + i, sizeof next);
    for (std::size_t j = 0; j < kQuads; ++j) {
      unordered |= next[j] != next[j];
      largest[j] = larger(next[j], largest[j]);
    }
  }
  const Quad all = larger(larger(largest[0], largest[1]), larger(largest[2], largest[3]));
  const bool is_nan = (unordered[0] | unordered[1] | unordered[2] | unordered[3]) != 0;
  return is_nan ? std::numeric_limits<float>::quiet_NaN() : larger(larger(all[0], all[1]), larger(all[2], all[3]));
}

// Of fewer, one at least.
float max_of_few(std::span<const float> x) {
  float largest = -kInf;
  for (const float value : x) {
    if (std::isnan(value)) return value;
    largest = larger(value, largest);
  }
  return largest;
}

// Part `index` of parts of `size`.
std::span<const float> part_of(std::span<const float> x, std::size_t size, std::size_t index) {
  return x.subspan(index * size, std::min(size, x.size() - index * size));
}

}  // namespace

template <std::size_t Size>
void TokenChoice::find_maxima() {
  maxima_.resize((logits_.size() + Size - 1) / Size);
  const std::size_t whole = logits_.size() / Size;
  for (std::size_t i = 0; i < whole; ++i) maxima_[i] = max_of_block<Size>(logits_.data() + i * Size);
  if (whole < maxima_.size()) maxima_[whole] = max_of_few(logits_.subspan(whole * Size));
  float top = -kInf;
  bool unordered = false;
  for (const float value : maxima_) {
    unordered |= value != value;
    top = larger(value, top);
  }
  top_ = top;
  if (unordered || !std::isfinite(top_))
    throw Error(
        "generate: the model gave logits that are no finite numbers; its weights or caches overflow. Try "
        "compute='float' and kv_dtype='float32'.");
}

std::int32_t TokenChoice::choose(std::span<const float> logits, const SamplingOptions& options, double uniform) {
  logits_ = logits;
  temperature_ = nearest_float(options.temperature);
  // Also temperatures that float32 has no number for.
  if (temperature_ == 0.0F) return greedy();
  find_maxima<kBlock>();
  for (float& value : maxima_) value = scaled(value);
  filtered_ = false;
  if (options.top_k > 0 && options.top_k < std::ssize(logits)) keep_top_k(options.top_k);
  if (options.top_p < 1.0) keep_top_p(options.top_p);
  if (const float min_p = nearest_float(options.min_p); min_p > 0.0F) keep_min_p(min_p);
  if (filtered_) return draw_candidate(uniform);
  sum_chunks();
  return draw_any(uniform);
}

std::int32_t TokenChoice::greedy() {
  find_maxima<kWide>();
  const auto block = std::find(maxima_.begin(), maxima_.end(), top_) - maxima_.begin();
  const auto first = logits_.begin() + block * static_cast<std::ptrdiff_t>(kWide);
  return static_cast<std::int32_t>(std::find(first, logits_.end(), top_) - logits_.begin());
}

float TokenChoice::bound_of_largest(std::size_t count) {
  if (count > maxima_.size()) return -kInf;
  values_ = maxima_;
  const auto last = values_.begin() + static_cast<std::ptrdiff_t>(count) - 1;
  std::nth_element(values_.begin(), last, values_.end(), std::greater<>());
  return *last;
}

std::size_t TokenChoice::scale(std::size_t first, std::span<float> values) const {
  const std::span<const float> logits = logits_.subspan(first, std::min(values.size(), logits_.size() - first));
  const float top = top_, temperature = temperature_;
  for (std::size_t i = 0; i < logits.size(); ++i) values[i] = (logits[i] - top) / temperature;
  return logits.size();
}

void TokenChoice::collect(float least) {
  candidates_.clear();
  filtered_ = true;
  float values[kBlock];
  // Scaling keeps the order, so a block whose largest is below has none.
  for (std::size_t i = 0; i < maxima_.size(); ++i) {
    if (maxima_[i] < least) continue;
    const std::size_t size = scale(i * kBlock, values);
    for (std::size_t j = 0; j < size; ++j)
      // What is minus infinity has no probability in any case.
      if (values[j] >= least && values[j] > -kInf)
        candidates_.push_back({values[j], static_cast<std::int32_t>(i * kBlock + j)});
  }
}

void TokenChoice::sum_chunks() {
  float values[kChunk];
  sums_.resize((logits_.size() + kChunk - 1) / kChunk);
  for (std::size_t i = 0; i < sums_.size(); ++i) {
    const std::size_t size = scale(i * kChunk, values);
    sums_[i] = ops::exp_sum({values, size});
  }
}

// Leaves the candidates' values in values_.
double TokenChoice::mass_of_candidates() {
  values_.clear();
  for (const Candidate& candidate : candidates_) values_.push_back(candidate.value);
  return ops::exp_sum(values_);
}

void TokenChoice::keep_top_k(std::int64_t count) {
  const auto wanted = static_cast<std::size_t>(count);
  collect(bound_of_largest(wanted));
  if (candidates_.size() <= wanted) return;
  values_.clear();
  for (const Candidate& candidate : candidates_) values_.push_back(candidate.value);
  const auto last = values_.begin() + count - 1;
  std::nth_element(values_.begin(), last, values_.end(), std::greater<>());
  std::erase_if(candidates_, [least = *last](const Candidate& candidate) { return candidate.value < least; });
}

void TokenChoice::keep_top_p(double share) {
  if (filtered_) return cut(share * mass_of_candidates());
  sum_chunks();
  double total = 0.0;
  for (const double sum : sums_) total += sum;
  for (std::size_t count = kLikely;; count *= kMore) {
    const float least = bound_of_largest(count);
    collect(least);
    if (mass_of_candidates() >= share * total || least == -kInf) return cut(share * total);
  }
}

// Keeps the candidates up to the first, by falling value, with which their mass reaches `wanted`. values_ are theirs.
void TokenChoice::cut(double wanted) {
  auto first = values_.begin(), end = values_.end();
  double before = 0.0;
  while (end - first > static_cast<std::ptrdiff_t>(kFew)) {
    const auto middle = first + (end - first) / 2;
    std::nth_element(first, middle, end, std::greater<>());
    const double mass = ops::exp_sum({first, middle});
    if (before + mass >= wanted) {
      end = middle;
    } else {
      before += mass;
      first = middle;
    }
  }
  std::sort(first, end, std::greater<>());
  for (; end - first > 1; ++first) {
    before += static_cast<double>(std::exp(*first));
    if (before >= wanted) break;
  }
  const float least = *first;
  // Of those that equal the last one the larger tokens come first.
  auto equal = std::count(values_.begin(), values_.end(), least), kept = first - values_.begin() + 1;
  auto dropped = equal - (kept - std::count_if(values_.begin(), values_.end(), [&](float v) { return v > least; }));
  std::erase_if(candidates_, [&](const Candidate& candidate) {
    return candidate.value < least || (candidate.value == least && dropped-- > 0);
  });
}

void TokenChoice::keep_min_p(float share) {
  // A little more than needed: what decides is the power, as it is rounded.
  if (!filtered_) collect(std::log(share) - 1.0F);
  // The largest is 0, so a power is the share of the largest probability.
  std::erase_if(candidates_, [&](const Candidate& candidate) { return std::exp(candidate.value) < share; });
}

// The first whose cumulative sum passes the number, of those that have any probability.
std::int32_t TokenChoice::draw_candidate(double uniform) {
  double total = 0.0;
  values_.clear();
  for (const Candidate& candidate : candidates_) {
    values_.push_back(std::exp(candidate.value));
    total += static_cast<double>(values_.back());
  }
  double sum = 0.0;
  std::int32_t last = 0;
  for (std::size_t i = 0; i < values_.size() && sum <= uniform * total; ++i) {
    sum += static_cast<double>(values_[i]);
    if (values_[i] > 0.0F) last = candidates_[i].token;
  }
  return last;
}

std::int32_t TokenChoice::draw_any(double uniform) const {
  double total = 0.0, sum = 0.0, before = 0.0;
  for (const double each : sums_) total += each;
  std::size_t chunk = 0;
  for (std::size_t i = 0; i < sums_.size() && sum <= uniform * total; ++i) {
    if (sums_[i] == 0.0) continue;
    chunk = i;
    before = sum;
    sum += sums_[i];
  }
  auto token = static_cast<std::int32_t>(chunk * kChunk), last = token;
  for (const float logit : part_of(logits_, kChunk, chunk)) {
    const float weight = std::exp(scaled(logit));
    before += static_cast<double>(weight);
    if (weight > 0.0F) last = token;
    if (before > uniform * total) break;
    ++token;
  }
  return last;
}

}  // namespace qtale::engine

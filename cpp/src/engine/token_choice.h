// The choice of one token from one row of logits.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "qtale/sampler.h"

namespace qtale::engine {

// An option as the logits' type has it; what is beyond that is its largest number, not infinity.
inline float nearest_float(double option) {
  return static_cast<float>(std::min(option, double{std::numeric_limits<float>::max()}));
}

// Keeps its memory for the next row. The largest logits of blocks of the row are found first: most blocks are then
// known to hold nothing that a filter keeps, and are not looked at again.
class TokenChoice {
 public:
  // The token for a number in [0, 1), which is not used when greedy. Throws Error as sample() does.
  std::int32_t choose(std::span<const float> logits, const SamplingOptions& options, double uniform);

 private:
  struct Candidate {
    float value;  // (logit - largest) / temperature
    std::int32_t token;
  };

  template <std::size_t Size>
  void find_maxima();
  std::int32_t greedy();
  float scaled(float logit) const { return (logit - top_) / temperature_; }
  // As many logits from the first as there are, or fit; returns their number.
  std::size_t scale(std::size_t first, std::span<float> values) const;
  // A number that the count largest values are not below.
  float bound_of_largest(std::size_t count);
  // Makes candidates of all values from `least` on, in the order of tokens.
  void collect(float least);
  void sum_chunks();
  double mass_of_candidates();

  void keep_top_k(std::int64_t count);
  void keep_top_p(double share);
  void cut(double wanted);
  void keep_min_p(float share);
  std::int32_t draw_candidate(double uniform);
  std::int32_t draw_any(double uniform) const;

  std::span<const float> logits_;
  float top_ = 0.0F, temperature_ = 1.0F;
  bool filtered_ = false;  // candidates_ are all that is left
  std::vector<float> maxima_, values_;
  std::vector<Candidate> candidates_;
  std::vector<double> sums_;
};

}  // namespace qtale::engine

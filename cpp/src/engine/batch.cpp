#include "engine/batch.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace qtale::engine {
namespace {

// NTK scaling by length, as transformers computes it: in double, then float32.
std::vector<float> dynamic_frequencies(const DecoderSpec& spec, std::int64_t length) {
  const RopeSpec& rope = spec.rope;
  const auto dim = static_cast<double>(spec.head_dim);
  const double growth = rope.dynamic_factor * static_cast<double>(length) / static_cast<double>(rope.dynamic_length) -
                        (rope.dynamic_factor - 1.0);
  const double base = rope.dynamic_base * std::pow(growth, dim / (dim - 2.0));
  std::vector<float> frequencies(rope.inv_freq.size());
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(dim);
    frequencies[i] = 1.0F / std::pow(static_cast<float>(base), exponent);
  }
  return frequencies;
}

// Angles are products in float32, as the models were trained with.
void add_angles(Batch& batch, const RopeSpec& rope, std::span<const float> frequencies, std::int32_t position) {
  for (int part = 0; part < 2; ++part)
    for (const float frequency : frequencies) {
      const float angle = frequency * static_cast<float>(position);
      batch.rope.push_back((part == 0 ? std::cos(angle) : std::sin(angle)) * rope.attention_factor);
    }
}

}  // namespace

Batch make_batch(std::span<const Segment> segments, std::span<const std::int64_t> lengths, const DecoderSpec& spec) {
  Batch batch;
  batch.starts.push_back(0);
  for (std::size_t s = 0; s < segments.size(); ++s) {
    const auto count = static_cast<std::int64_t>(segments[s].tokens.size());
    const std::int64_t length = std::max(lengths[s] + count, segments[s].text_length);
    const bool grown = spec.rope.dynamic_length > 0 && length > spec.rope.dynamic_length;
    const std::vector<float> frequencies = grown ? dynamic_frequencies(spec, length) : spec.rope.inv_freq;
    for (std::int64_t i = 0; i < count; ++i) {
      batch.tokens.push_back(segments[s].tokens[static_cast<std::size_t>(i)]);
      batch.positions.push_back(static_cast<std::int32_t>(lengths[s] + i));
      add_angles(batch, spec.rope, frequencies, batch.positions.back());
    }
    batch.starts.push_back(batch.rows());
  }
  batch.all.resize(batch.tokens.size());
  std::iota(batch.all.begin(), batch.all.end(), 0);
  return batch;
}

}  // namespace qtale::engine

// The rows of one call: which token, at which position, of which segment.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "qtale/engine.h"

namespace qtale::engine {

struct Batch {
  std::vector<std::int32_t> tokens;
  std::vector<std::int32_t> positions;
  std::vector<std::int64_t> starts;  // first row of each segment, and the number of rows
  std::vector<float> rope;           // [rows, head_dim]: cosines, sines
  std::vector<std::int32_t> all;     // 0, 1, 2 …

  std::int64_t rows() const { return static_cast<std::int64_t>(tokens.size()); }
};

// `lengths` are those of the segments' sequences (of their parents, where they have one) when their tokens enter.
Batch make_batch(std::span<const Segment> segments, std::span<const std::int64_t> lengths, const DecoderSpec& spec);

}  // namespace qtale::engine

#include "engine/sequences.h"

#include "core/text.h"

namespace qtale::engine {

std::int64_t Sequences::add() {
  Sequence sequence;
  sequence.layers.reserve(layers_);
  for (std::size_t layer = 0; layer < layers_; ++layer) sequence.layers.emplace_back(pool_, layer);
  sequences_.emplace(next_, std::move(sequence));
  return next_++;
}

void Sequences::remove(std::int64_t id) { sequences_.erase(id); }

Sequence& Sequences::at(std::int64_t id) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) fail_input("Decoder: there is no sequence {}; it was removed or never added.", id);
  return found->second;
}

void Sequences::truncate(Sequence& sequence, std::int64_t length) {
  if (length < 0 || length > sequence.length)
    fail_input("truncate: a sequence of {} tokens cannot be cut to {}; use 0 to {}.", sequence.length, length,
               sequence.length);
  for (LayerCache& cache : sequence.layers) cache.truncate(static_cast<std::int32_t>(length));
  sequence.length = length;
}

}  // namespace qtale::engine

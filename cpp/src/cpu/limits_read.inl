// Readers, written once over the Line (64 bytes in registers) of the including file's instruction set.
#pragma once

#include "cpu/limits.h"

namespace qtale::cpu {
namespace {

// `Streams` equal parts side by side, each prefetched `Ahead` bytes ahead; a last part of a line is left out.
template <int Streams, int Ahead>
void read_streams(const std::byte* data, std::int64_t bytes) {
  const std::int64_t stream = bytes / (Streams * kLine) * kLine;
  Line seen[Streams] = {};
  for (std::int64_t i = 0; i < stream; i += kLine) {
#pragma GCC unroll 4
    for (int s = 0; s < Streams; ++s) {
      const std::byte* line = data + s * stream + i;
      if constexpr (Ahead > 0) __builtin_prefetch(line + Ahead);
      merge(seen[s], line);
    }
  }
  for (std::int64_t i = Streams * stream; i + kLine <= bytes; i += kLine) merge(seen[0], data + i);
  for (const Line& line : seen) keep(line);
}

#define QTALE_READERS                                     \
  {                                                       \
      {"1 stream", read_streams<1, 0>},                   \
      {"1 stream, 1024 B ahead", read_streams<1, 1024>},  \
      {"1 stream, 4096 B ahead", read_streams<1, 4096>},  \
      {"4 streams", read_streams<4, 0>},                  \
      {"4 streams, 512 B ahead", read_streams<4, 512>},   \
      {"4 streams, 1024 B ahead", read_streams<4, 1024>}, \
      {"4 streams, 2048 B ahead", read_streams<4, 2048>}, \
      {"4 streams, 4096 B ahead", read_streams<4, 4096>}, \
  }

}  // namespace
}  // namespace qtale::cpu

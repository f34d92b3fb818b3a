// What this machine can do at most, measured on the threads of parallel_for with the instruction set in use:
// the yardstick of kernels, to be taken right beside them, because clocks and memory bandwidth move.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace qtale {

struct Span {
  const void* data;
  std::int64_t bytes;
};

// Ways to read memory: one stream or four, prefetched some bytes ahead or not. Which is best differs between machines.
std::vector<std::string> reader_names();

// Seconds of one pass over all spans; `reader` is an index of reader_names().
double read_seconds(const std::vector<Span>& spans, int reader);

// Seconds of one copy past the caches (it moves 2 * bytes); both sides 64-byte aligned and bytes a multiple of 64.
double copy_seconds(const void* from, void* to, std::int64_t bytes);

struct MemoryLimits {
  double read;         // bytes per second of the best reader
  std::string reader;  // its name
  double copy;         // bytes read and written per second
};

// Medians of `passes` interleaved passes over memory of its own, `bytes` of it, in huge pages where there are some.
MemoryLimits measure_memory(std::int64_t bytes, int passes);

enum class Peak : std::uint8_t {
  int8_dot,   // u8 x s8 into int32: vpdpbusd; vpmaddubsw + vpmaddwd + vpaddd where there is no VNNI
  int8_tile,  // the same by tiles of AMX: tdpbsud
  u4_int16,   // u4 x s8 summed in int16 (vpmaddubsw + vpaddw): the way past the int8 limit of AVX2
  f32_fma,
};

// Operations (two per multiply-add) per second in a run of about `seconds`; nothing where no loop was written for it.
std::optional<double> measure_peak(Peak peak, double seconds);

}  // namespace qtale

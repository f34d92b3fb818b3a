// Loops that run one thread at the limits of its machine; one table per instruction set, chosen as kernels are.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qtale::cpu {

inline constexpr std::int64_t kLine = 64;

struct Reader {
  const char* name;
  void (*read)(const std::byte* data, std::int64_t bytes);
};
inline constexpr int kReaders = 8;

// Independent instructions of one kind; `run` is nullptr where the limit is not known.
struct PeakLoop {
  void (*run)(std::int64_t rounds);
  std::int64_t ops_per_round;
};

struct LimitTable {
  Reader readers[kReaders];
  void (*copy)(const std::byte* from, std::byte* to, std::int64_t bytes);  // whole, aligned lines
  PeakLoop int8_dot;
  PeakLoop int8_tile;
  PeakLoop u4_int16;
  PeakLoop f32_fma;
};

extern const LimitTable generic_limits;
#ifdef QTALE_X86
extern const LimitTable avx2_limits;
extern const LimitTable avx512_limits;
extern const PeakLoop amx_tile_limits;
#endif

}  // namespace qtale::cpu

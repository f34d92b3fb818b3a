// Instructions of AMX. They are spelled out: the intrinsics of g++ 12 want literals, and hide from it which memory they
// read.
#pragma once

#include <cstdint>

#include "cpu/unroll.h"

namespace qtale::cpu {
namespace {

constexpr int kTileRegisters = 8;
constexpr std::int64_t kTileRows = 16, kTileLine = 64, kTileBytes = kTileRows * kTileLine;
constexpr std::int64_t kLineNumbers = kTileLine / 2, kTileNumbers = kTileBytes / 2;  // of bf16

// Rows and bytes per row of the tile registers, whole ones where not set.
class TileShapes {
 public:
  TileShapes() {
    for (int tile = 0; tile < kTileRegisters; ++tile) set(tile, kTileRows, kTileLine);
  }
  void set(int tile, std::int64_t rows, std::int64_t line) {
    config_[16 + 2 * tile] = static_cast<std::uint8_t>(line);
    config_[48 + tile] = static_cast<std::uint8_t>(rows);
  }
  // Puts the tile registers of the calling thread into use, with zeros.
  void use() const { asm volatile("ldtilecfg (%0)" : : "r"(config_) : "memory"); }

 private:
  alignas(64) std::uint8_t config_[64] = {1};  // palette
};

// Puts them out of use: no other code finds them configured, and switches between threads have nothing of them to save.
inline void release_tiles() { asm volatile("tilerelease"); }

template <int Tile>
QTALE_INLINE void load_tile(const void* from, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(Tile) : "memory");
}
// The same of lines that are not wanted in L1 afterwards.
template <int Tile>
QTALE_INLINE void pass_tile(const void* from, std::int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
QTALE_INLINE void store_tile_sums(void* to, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
QTALE_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(Tile));
}

// Sums += rows times lines: signed bytes by signed or unsigned ones,
template <bool SignedLines, int Sums, int Rows, int Lines>
QTALE_INLINE void multiply_tiles() {
  if constexpr (SignedLines) {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Rows), "i"(Lines));
  } else {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Rows), "i"(Lines));
  }
}
// or bf16 numbers, into float32: even and odd inputs are summed in turn, then both, then the sums so far.
template <int Sums, int Rows, int Lines>
QTALE_INLINE void multiply_bf16_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Rows), "i"(Lines));
}

}  // namespace
}  // namespace qtale::cpu

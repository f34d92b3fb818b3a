// The limit of products by AMX.
#include <cstdint>

#include "cpu/limits.h"

namespace qtale::cpu {
namespace {

constexpr int kSums = 6;  // tiles in turn; two more hold factors
constexpr int kOpsPerTile = 2 * 16 * 16 * 64;

__attribute__((noipa)) void tile_loop(std::int64_t rounds) {
  alignas(64) std::uint8_t config[64] = {1};  // palette; bytes per row from 16 on, rows from 48 on
  for (int tile = 0; tile < 8; ++tile) {
    config[16 + 2 * tile] = 64;
    config[48 + tile] = 16;
  }
  asm volatile("ldtilecfg (%0)" : : "r"(config) : "memory");
  for (; rounds > 0; --rounds)
    asm volatile(
        "tdpbsud %tmm7, %tmm6, %tmm0\n\ttdpbsud %tmm7, %tmm6, %tmm1\n\ttdpbsud %tmm7, %tmm6, %tmm2\n\t"
        "tdpbsud %tmm7, %tmm6, %tmm3\n\ttdpbsud %tmm7, %tmm6, %tmm4\n\ttdpbsud %tmm7, %tmm6, %tmm5");
  asm volatile("tilerelease");
}

}  // namespace

const PeakLoop amx_tile_limits = {tile_loop, kSums * kOpsPerTile};

}  // namespace qtale::cpu

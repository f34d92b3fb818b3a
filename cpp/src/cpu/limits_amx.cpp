// The limit of products by AMX.
#include "cpu/amx.inl"
#include "cpu/limits.h"

namespace qtale::cpu {
namespace {

constexpr int kSums = 6;  // tiles in turn; two more hold factors
constexpr int kOpsPerTile = 2 * kTileRows * kTileRows * kTileLine;

__attribute__((noipa)) void tile_loop(std::int64_t rounds) {
  TileShapes().use();
  for (; rounds > 0; --rounds)
    asm volatile(
        "tdpbsud %tmm7, %tmm6, %tmm0\n\ttdpbsud %tmm7, %tmm6, %tmm1\n\ttdpbsud %tmm7, %tmm6, %tmm2\n\t"
        "tdpbsud %tmm7, %tmm6, %tmm3\n\ttdpbsud %tmm7, %tmm6, %tmm4\n\ttdpbsud %tmm7, %tmm6, %tmm5");
  release_tiles();
}

}  // namespace

const PeakLoop amx_tile_limits = {tile_loop, kSums * kOpsPerTile};

}  // namespace qtale::cpu

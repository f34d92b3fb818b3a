// Weights in tiles for tests, and the tiers that multiply them.
#pragma once

#include <cstdint>

#include "qtale/decoder_ops.h"
#include "qtale/device.h"
#include "support.h"

namespace qtale::test {

struct Size {
  std::int64_t out, in;
};
// One tile, odd numbers of tiles, depths of one block and of several.
inline constexpr Size kSizes[] = {{16, 32}, {48, 96}, {80, 288}, {96, 576}, {176, 608}, {304, 1408}};

// The tiers that multiply weights in tiles: the scalar one, and AMX where this CPU has it.
inline bool takes_tiles(const std::string& isa) { return isa == "reference" || isa == "avx512_amx"; }

// Calls fn(isa) with each of them in use; the scalar one is spared what would take long.
template <class Fn>
void with_tiles(std::int64_t products, Fn&& fn) {
  for (const std::string& isa : cpu_isas()) {
    if (!takes_tiles(isa) || (isa == "reference" && products > 1'000'000)) continue;
    const IsaScope scope(isa);
    fn(isa);
  }
}

inline TensorView tiles_of(void* data, const Size& size) {
  TensorView t;
  t.data = data;
  t.dtype = DType::bf16;
  t.rank = 4;
  t.shape = {size.out / kTileOutputs, size.in / kTileInputs, kTileOutputs, kTileInputs};
  t.strides = {size.in * kTileOutputs, kTileOutputs * kTileInputs, kTileInputs, 1};
  return t;
}
inline TensorView tiles_of(Floats& memory, const Size& size) { return tiles_of(memory.data(), size); }

inline Floats tiled(const Floats& weight, const Size& size) {
  Floats out(DType::bf16, weight.size());
  round_weights(weight.matrix(size.out, size.in), tiles_of(out, size));
  return out;
}

inline Floats rounded(const Floats& values) {
  Floats out(DType::bf16, values.size());
  for (std::int64_t i = 0; i < values.size(); ++i) out.set(i, values.get(i));
  return out;
}

inline Floats product(const TensorView& x, const TensorView& weight, const Floats* bias, std::int64_t rows,
                      std::int64_t out) {
  Floats y(DType::f32, rows * out);
  const TensorView bias_view = bias == nullptr ? TensorView{} : bias->vector();
  matmul(x, weight, bias == nullptr ? nullptr : &bias_view, y.matrix(rows, out), Compute::bfloat16);
  return y;
}

}  // namespace qtale::test

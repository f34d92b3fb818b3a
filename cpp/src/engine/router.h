// Which tokens run a layer.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/workspace.h"
#include "qtale/engine.h"

namespace qtale::engine {

// The router of a layer with its matrix rounded to bfloat16 numbers where its products take such: half as much is read
// for each token. The router given has to stay.
class LayerRouter {
 public:
  // Unless `rounding` is Compute::floating, the products of x are those of bfloat16 numbers where the CPU has such.
  LayerRouter(const Router& router, Compute rounding);
  LayerRouter(const LayerRouter&) = delete;
  LayerRouter& operator=(const LayerRouter&) = delete;
  LayerRouter(LayerRouter&&) = default;
  LayerRouter& operator=(LayerRouter&&) = default;
  ~LayerRouter() = default;

  // Bytes that it reads for a token.
  std::int64_t bytes() const;

  // Probability to execute for each row of x [rows, hidden], the raw residual stream.
  std::vector<float> execution_probabilities(const TensorView& x, Workspace& workspace) const;

 private:
  const Router* router_;
  Compute rounding_;
  std::vector<std::uint16_t> rounded_;  // [h, hidden], or empty
  TensorView matrix_;                   // of the first product: rounded or as given
};

}  // namespace qtale::engine

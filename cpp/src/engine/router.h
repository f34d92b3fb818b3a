// Which tokens run a layer.
#pragma once

#include <vector>

#include "engine/workspace.h"
#include "qtale/engine.h"

namespace qtale::engine {

// Probability to execute for each row of x [rows, hidden], the raw residual stream. Unless `rounding` is
// Compute::floating, the products of x are those of bfloat16 numbers where the CPU has such.
std::vector<float> execution_probabilities(const Router& router, const TensorView& x, Compute rounding,
                                           Workspace& workspace);

}  // namespace qtale::engine

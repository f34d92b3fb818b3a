// Which tokens run a layer.
#pragma once

#include <vector>

#include "engine/workspace.h"
#include "qtale/engine.h"

namespace qtale::engine {

// Probability to execute for each row of x [rows, hidden], the raw residual stream.
std::vector<float> execution_probabilities(const Router& router, const TensorView& x, Workspace& workspace);

}  // namespace qtale::engine

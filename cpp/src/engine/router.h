// Which tokens run a layer.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/workspace.h"
#include "qtale/engine.h"

namespace qtale::engine {

// Rounds the matrix of a router to bfloat16 numbers where its products take such: half as much is read for each token.
// The router points into what is returned, which is empty where there is nothing to round.
std::vector<std::uint16_t> round_matrix(Router& router, Compute rounding);

// Bytes that it reads for a token.
std::int64_t bytes_of(const Router& router);

// Probability to execute for each row of x [rows, hidden], the raw residual stream. Unless `rounding` is
// Compute::floating, the products of x are those of bfloat16 numbers where the CPU has such.
std::vector<float> execution_probabilities(const Router& router, const TensorView& x, Compute rounding,
                                           Workspace& workspace);

}  // namespace qtale::engine

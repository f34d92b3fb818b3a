// Logits of the last layer's rows, and their scores, in pieces between which a call may be ended.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "engine/workspace.h"
#include "qtale/engine.h"

namespace qtale::engine {

// Products of a piece of logits: about a tenth of a second on a slow core with AVX2. A packed head, which has no parts,
// takes 64 rows at least.
inline constexpr std::int64_t kPieceProducts = std::int64_t{1} << 32;

// logits [rows, vocab] = x [rows, hidden] times the head.
void multiply_head(const TensorView& x, const DecoderSpec& spec, const TensorView& logits,
                   const std::function<void()>& poll, std::int64_t piece_products = kPieceProducts);

// Log-softmax of rows of x [rows, hidden] at targets[i], for the rows that row_of[i] names in ascending order.
std::vector<Score> score_rows(const TensorView& x, const DecoderSpec& spec, std::span<const std::int64_t> row_of,
                              std::span<const std::int32_t> targets, Workspace& workspace,
                              const std::function<void()>& poll);

}  // namespace qtale::engine

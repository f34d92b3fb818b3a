// Products with the matrices of a decoder, whether they are packed or not.
#pragma once

#include <cstdint>
#include <span>

#include "qtale/engine.h"

namespace qtale::engine {

bool is_packed(const Matrix& matrix);
bool is_packed(std::span<const Matrix> projection);  // all of its matrices
bool is_dense(std::span<const Matrix> projection);   // none of them is packed
std::int64_t out_features(const Matrix& matrix);
std::int64_t out_features(const Projection& projection);
std::int64_t in_features(const Matrix& matrix);
// Outputs [first, first + count) of a matrix; of a packed one only all of them, of a tiled one whole tiles.
Matrix some_outputs(const Matrix& matrix, std::int64_t first, std::int64_t count);

// y [rows, out] = x [rows, in] times one matrix.
void multiply(const TensorView& x, const Matrix& matrix, const TensorView& y, Compute compute);
// The same for matrices side by side, but only for those that have outputs at or after `first`. next: what is
// multiplied after them, where that is known.
void multiply(const TensorView& x, const Projection& projection, const TensorView& y, Compute compute,
              std::span<const Matrix> next, std::int64_t first = 0);

// y += x times the projection; false and nothing done where there is no such kernel.
bool multiply_add(const TensorView& x, const Projection& projection, const TensorView& y, Compute compute);

// silu_mul of both products of a gate and what it gates, at once, into y [rows, out] f32|bf16; false and nothing done
// where there is no such kernel. Where there is, a product in bfloat16 takes what is bf16.
bool multiply_gated(const TensorView& x, const Projection& gate_up, const TensorView& y, Compute compute);

}  // namespace qtale::engine

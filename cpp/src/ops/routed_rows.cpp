#include <vector>

#include "core/text.h"
#include "cpu/backend.h"
#include "ops/check.h"
#include "qtale/decoder_ops.h"

namespace qtale {
namespace {

void check_indices(std::string_view op, const TensorView& indices, std::int64_t count, std::int64_t rows) {
  ops::check_dtype(op, "indices", indices, DType::s32);
  ops::check_cpu(op, indices);
  if (indices.rank != 1 || indices.shape[0] != count)
    fail_input("{}: indices has shape {}; expected [{}], one for each compact row.", op, ops::shape_text(indices),
               count);
  ops::check_contiguous(op, "indices", indices);
  const auto* index = indices.as<const std::int32_t>();
  for (std::int64_t i = 0; i < count; ++i)
    if (index[i] < 0 || index[i] >= rows)
      fail_input("{}: index {} at place {} is not a row of x; expected 0 to {}.", op, index[i], i, rows - 1);
}

// Ascending indices, as routing makes them, need no memory to be told apart.
void check_distinct(std::string_view op, const std::int32_t* index, std::int64_t count, std::int64_t rows) {
  std::vector<bool> seen;
  for (std::int64_t i = 1; i < count; ++i) {
    if (seen.empty()) {
      if (index[i] > index[i - 1]) continue;
      seen.resize(static_cast<std::size_t>(rows));
      for (std::int64_t before = 0; before < i; ++before) seen[static_cast<std::size_t>(index[before])] = true;
    }
    const auto row = static_cast<std::size_t>(index[i]);
    if (seen[row]) fail_input("{}: index {} stands twice, again at place {}; use each row once.", op, index[i], i);
    seen[row] = true;
  }
}

void check_rows(std::string_view op, std::string_view name, const TensorView& t) {
  ops::check_matrix(op, name, t);
  ops::check_cpu(op, t);
}

void check_width(std::string_view op, std::string_view name, const TensorView& t, std::int64_t size) {
  if (t.shape[1] != size)
    fail_input("{}: the rows of {} have {} elements, those of x {}; both need the same.", op, name, t.shape[1], size);
}

}  // namespace

void compact_rows(const TensorView& x, const TensorView& indices, const TensorView& out) {
  constexpr auto op = "compact_rows";
  ops::check_float(op, "x", x);
  check_rows(op, "x", x);
  ops::check_dtype(op, "out", out, DType::f32);
  check_rows(op, "out", out);
  check_width(op, "out", out, x.shape[1]);
  check_indices(op, indices, out.shape[0], x.shape[0]);
  cpu::compact_rows(
      {{x.data, x.dtype, x.strides[0]}, indices.as<const std::int32_t>(), x.shape[1], out.as<float>(), out.strides[0]},
      out.shape[0]);
}

void scatter_add_rows(const TensorView& delta, const TensorView& indices, const TensorView* gates,
                      const TensorView& x) {
  constexpr auto op = "scatter_add_rows";
  ops::check_dtype(op, "delta", delta, DType::f32);
  check_rows(op, "delta", delta);
  ops::check_dtype(op, "x", x, DType::f32);
  check_rows(op, "x", x);
  check_width(op, "delta", delta, x.shape[1]);
  const std::int64_t count = delta.shape[0];
  check_indices(op, indices, count, x.shape[0]);
  check_distinct(op, indices.as<const std::int32_t>(), count, x.shape[0]);
  if (gates != nullptr) {
    ops::check_dtype(op, "gates", *gates, DType::f32);
    ops::check_cpu(op, *gates);
    if (gates->rank != 1 || gates->shape[0] != count)
      fail_input("{}: gates has shape {}; expected [{}], one for each row of delta.", op, ops::shape_text(*gates),
                 count);
    ops::check_contiguous(op, "gates", *gates);
  }
  cpu::scatter_add_rows({delta.as<const float>(), delta.strides[0], indices.as<const std::int32_t>(),
                         gates ? gates->as<const float>() : nullptr, x.shape[1], x.as<float>(), x.strides[0]},
                        count);
}

}  // namespace qtale

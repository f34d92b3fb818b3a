#include "core/text.h"
#include "cpu/decoder.h"
#include "ops/check.h"

namespace qtale {

void rope(const TensorView& x, const TensorView& table, const TensorView& positions) {
  constexpr auto op = "rope";
  ops::check_heads(op, "x", x, 3);
  const std::int64_t rows = x.shape[0], head_dim = x.shape[2];
  if (head_dim % 2 != 0) fail_input("rope: head_dim is {}; it rotates pairs, so use an even one.", head_dim);
  ops::check_matrix(op, "table", table, DType::f32);
  if (table.shape[1] != head_dim)
    fail_input("rope: the table has {} columns; expected head_dim, {}.", table.shape[1], head_dim);
  ops::check_vector(op, "positions", positions, DType::s32, rows);
  const auto* position = positions.as<const std::int32_t>();
  for (std::int64_t r = 0; r < rows; ++r)
    if (position[r] < 0 || position[r] >= table.shape[0])
      fail_input("rope: position {} of row {} is not in the table; it has {} rows.", position[r], r, table.shape[0]);
  cpu::rope({{x.as<float>(), x.strides[0], x.strides[1]},
             x.shape[1],
             head_dim / 2,
             table.as<const float>(),
             table.strides[0],
             position},
            rows);
}

}  // namespace qtale

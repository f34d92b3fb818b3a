#include "core/text.h"
#include "solve/check.h"

namespace qtale {

void accumulate_gram(const TensorView& x, const TensorView* row_weight, const TensorView& gram) {
  constexpr auto op = "accumulate_gram";
  if (x.dtype != DType::f32 && x.dtype != DType::bf16)
    fail_input("{}: x is {}; expected float32 or bfloat16.", op, name_of(x.dtype));
  ops::check_matrix(op, "x", x);
  ops::check_cpu(op, x);
  const std::int64_t rows = x.shape[0], in = x.shape[1];
  if (gram.dtype != DType::f32 && gram.dtype != DType::f64)
    fail_input("{}: gram is {}; expected float64 or float32.", op, name_of(gram.dtype));
  ops::check_matrix(op, "gram", gram);
  ops::check_cpu(op, gram);
  if (gram.shape[0] != in || gram.shape[1] != in)
    fail_input("{}: gram has shape {}; expected [{}, {}].", op, ops::shape_text(gram), in, in);
  if (row_weight != nullptr) ops::check_vector(op, "row_weight", *row_weight, DType::f32, rows);
  cpu::accumulate_gram({x.data, x.dtype, x.strides[0], rows, in, row_weight ? row_weight->as<const float>() : nullptr,
                        gram.data, gram.dtype, gram.strides[0]});
}

}  // namespace qtale

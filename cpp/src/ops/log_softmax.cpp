#include "core/text.h"
#include "cpu/decoder.h"
#include "ops/check.h"

namespace qtale {
namespace {

constexpr auto kOp = "log_softmax_at";

void check_vector(std::string_view name, const TensorView& t, DType dtype, std::int64_t size) {
  ops::check_dtype(kOp, name, t, dtype);
  ops::check_cpu(kOp, t);
  if (t.rank != 1 || t.shape[0] != size)
    fail_input("log_softmax_at: {} has shape {}; expected [{}].", name, ops::shape_text(t), size);
  ops::check_contiguous(kOp, name, t);
}

void check_indices(std::string_view name, const TensorView& t, std::int64_t size) {
  for (std::int64_t i = 0; i < t.shape[0]; ++i)
    if (t.as<const std::int32_t>()[i] < 0 || t.as<const std::int32_t>()[i] >= size)
      fail_input("log_softmax_at: {} holds {}; use 0 to {}.", name, t.as<const std::int32_t>()[i], size - 1);
}

}  // namespace

void log_softmax_at(const TensorView& logits, const TensorView& rows, const TensorView& targets,
                    const TensorView& log_probs, const TensorView& greedy) {
  ops::check_matrix(kOp, "logits", logits, DType::f32);
  const std::int64_t count = rows.rank == 1 ? rows.shape[0] : -1;
  check_vector("rows", rows, DType::s32, count);
  check_vector("targets", targets, DType::s32, count);
  check_vector("log_probs", log_probs, DType::f32, count);
  check_vector("greedy", greedy, DType::u8, count);
  check_indices("rows", rows, logits.shape[0]);
  check_indices("targets", targets, logits.shape[1]);
  cpu::log_softmax_at({logits.as<const float>(), logits.strides[0], logits.shape[1], rows.as<const std::int32_t>(),
                       targets.as<const std::int32_t>(), log_probs.as<float>(), greedy.as<std::uint8_t>()},
                      count);
}

}  // namespace qtale

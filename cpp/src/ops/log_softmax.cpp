#include <cmath>
#include <span>
#include <vector>

#include "core/text.h"
#include "cpu/decoder.h"
#include "ops/check.h"
#include "qtale/decoder_ops.h"

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

std::vector<std::int32_t> indices_of(std::string_view name, const TensorView& t, std::int64_t size) {
  const std::span<const std::int32_t> all(t.as<const std::int32_t>(), static_cast<std::size_t>(t.shape[0]));
  for (const std::int32_t index : all)
    if (index < 0 || index >= size) fail_input("log_softmax_at: {} holds {}; use 0 to {}.", name, index, size - 1);
  return {all.begin(), all.end()};
}

}  // namespace

LogSoftmax::LogSoftmax(const TensorView& rows, const TensorView& targets, std::int64_t vocab) : vocab_(vocab) {
  const std::int64_t count = rows.rank == 1 ? rows.shape[0] : -1;
  check_vector("rows", rows, DType::s32, count);
  check_vector("targets", targets, DType::s32, count);
  rows_ = indices_of("rows", rows, std::int64_t{1} << 31);
  targets_ = indices_of("targets", targets, vocab);
  state_.resize(rows_.size());
}

void LogSoftmax::add(const TensorView& logits) {
  ops::check_matrix(kOp, "logits", logits, DType::f32);
  if (logits.shape[1] == 0) return;
  if (logits.shape[1] > vocab_ - seen_)
    fail_input("log_softmax_at: logits of {} entries come after {} of {}.", logits.shape[1], seen_, vocab_);
  for (const std::int32_t row : rows_)
    if (row >= logits.shape[0]) fail_input("log_softmax_at: rows holds {}; use 0 to {}.", row, logits.shape[0] - 1);
  cpu::add_logits({logits.as<const float>(), logits.strides[0], seen_, logits.shape[1], rows_, targets_}, state_);
  seen_ += logits.shape[1];
}

void LogSoftmax::finish(const TensorView& log_probs, const TensorView& greedy) const {
  check_vector("log_probs", log_probs, DType::f32, std::ssize(state_));
  check_vector("greedy", greedy, DType::u8, std::ssize(state_));
  if (seen_ != vocab_) fail_input("log_softmax_at: logits of {} entries came, but there are {}.", seen_, vocab_);
  for (std::size_t i = 0; i < state_.size(); ++i) {
    const TargetLogit& target = state_[i];
    const double distance = static_cast<double>(target.value) - static_cast<double>(target.top);
    log_probs.as<float>()[i] = static_cast<float>(distance - std::log(target.sum));
    greedy.as<std::uint8_t>()[i] = target.value == target.top && target.is_first;
  }
}

void log_softmax_at(const TensorView& logits, const TensorView& rows, const TensorView& targets,
                    const TensorView& log_probs, const TensorView& greedy) {
  ops::check_matrix(kOp, "logits", logits, DType::f32);
  LogSoftmax softmax(rows, targets, logits.shape[1]);
  check_vector("log_probs", log_probs, DType::f32, rows.shape[0]);
  check_vector("greedy", greedy, DType::u8, rows.shape[0]);
  softmax.add(logits);
  softmax.finish(log_probs, greedy);
}

}  // namespace qtale

#include "engine/head.h"

#include <algorithm>

#include "engine/projection.h"
#include "qtale/decoder_ops.h"

namespace qtale::engine {
namespace {

// Rows that are scored at once, with a packed head and without, and the entries of a piece of the vocabulary: 4 MiB of
// logits. The pieces are the same for any number of rows, so that the score of a row is, too.
constexpr std::int64_t kPackedRows = 64, kScoredRows = 512, kScoredEntries = 2048;
static_assert(kScoredEntries % kTileOutputs == 0);

TensorView some_rows(const TensorView& x, std::int64_t first, std::int64_t count) {
  TensorView part = x;
  part.data = x.as<float>() + first * x.strides[0];
  part.shape[0] = count;
  return part;
}

// Rows whose logits are made in pieces of the vocabulary; a packed head has one piece, of fewer rows.
void score_some(const TensorView& x, const DecoderSpec& spec, std::span<const std::int32_t> rows,
                std::span<const std::int32_t> targets, Workspace& workspace, const std::function<void()>& poll,
                std::span<Score> out) {
  const auto vector = [](std::span<const std::int32_t> values) {
    return TensorView::vector(const_cast<std::int32_t*>(values.data()), DType::s32, std::ssize(values));
  };
  const std::int64_t at_once = is_packed(spec.head) ? spec.vocab_size : kScoredEntries;
  LogSoftmax softmax(vector(rows), vector(targets), spec.vocab_size);
  for (std::int64_t entry = 0; entry < spec.vocab_size; entry += at_once) {
    if (poll) poll();
    const std::int64_t count = std::min(at_once, spec.vocab_size - entry);
    const TensorView logits = workspace.matrix(Buffer::gate_up, x.shape[0], count);
    multiply(x, some_outputs(spec.head, entry, count), logits, spec.compute);
    softmax.add(logits);
  }
  std::vector<float> log_probs(rows.size());
  std::vector<std::uint8_t> greedy(rows.size());
  const auto size = std::ssize(rows);
  softmax.finish(TensorView::vector(log_probs.data(), DType::f32, size),
                 TensorView::vector(greedy.data(), DType::u8, size));
  for (std::size_t i = 0; i < rows.size(); ++i) out[i] = {log_probs[i], greedy[i] != 0};
}

}  // namespace

void multiply_head(const TensorView& x, const DecoderSpec& spec, const TensorView& logits,
                   const std::function<void()>& poll, std::int64_t piece_products) {
  const bool packed = is_packed(spec.head);
  const std::int64_t rows = packed ? std::max(kPackedRows, piece_products / (spec.vocab_size * spec.hidden_size))
                                   : std::max<std::int64_t>(1, x.shape[0]);
  const std::int64_t pieces = piece_products / (rows * spec.hidden_size * kScoredEntries);
  const std::int64_t entries = packed ? spec.vocab_size : std::max<std::int64_t>(1, pieces) * kScoredEntries;
  for (std::int64_t row = 0; row < x.shape[0]; row += rows)
    for (std::int64_t entry = 0; entry < spec.vocab_size; entry += entries) {
      if (poll) poll();
      const std::int64_t height = std::min(rows, x.shape[0] - row), width = std::min(entries, spec.vocab_size - entry);
      multiply(some_rows(x, row, height), some_outputs(spec.head, entry, width),
               columns(some_rows(logits, row, height), entry, width), spec.compute);
    }
}

std::vector<Score> score_rows(const TensorView& x, const DecoderSpec& spec, std::span<const std::int64_t> row_of,
                              std::span<const std::int32_t> targets, Workspace& workspace,
                              const std::function<void()>& poll) {
  std::vector<Score> scores(targets.size());
  const std::span<Score> out(scores);
  const std::int64_t at_once = is_packed(spec.head) ? kPackedRows : kScoredRows;
  std::vector<std::int32_t> rows;
  std::size_t done = 0;
  for (std::int64_t row = 0; row < x.shape[0]; row += at_once) {
    const std::int64_t count = std::min(at_once, x.shape[0] - row);
    rows.clear();
    for (std::size_t i = done; i < row_of.size() && row_of[i] < row + count; ++i)
      rows.push_back(static_cast<std::int32_t>(row_of[i] - row));
    score_some(some_rows(x, row, count), spec, rows, targets.subspan(done, rows.size()), workspace, poll,
               out.subspan(done, rows.size()));
    done += rows.size();
  }
  return scores;
}

}  // namespace qtale::engine

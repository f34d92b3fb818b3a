// Log-softmax of logits at targets on every instruction set against float64, of whole rows and in pieces; refusals.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "catch.h"
#include "qtale/decoder_ops.h"
#include "support.h"

namespace qtale::test {

TEST_CASE("log_softmax_at on every instruction set", "[decoder_ops]") {
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const std::int64_t vocab : {1, 5, 33, 4100, 9001}) {
      CAPTURE(isa, vocab);
      Random random(static_cast<std::uint64_t>(vocab));
      const Floats logits = normal_floats(random, DType::f32, 3 * vocab, 8.0f);
      std::vector<std::int32_t> rows, targets;
      for (int i = 0; i < 20; ++i) {
        rows.push_back(i / 8);
        targets.push_back(random.integer(0, static_cast<int>(vocab) - 1));
      }
      const float* first = static_cast<const float*>(logits.data());
      targets[0] = static_cast<std::int32_t>(std::max_element(first, first + vocab) - first);
      std::vector<float> log_probs(rows.size());
      std::vector<std::uint8_t> greedy(rows.size());
      const auto size = std::ssize(rows);
      log_softmax_at(logits.matrix(3, vocab), TensorView::vector(rows.data(), DType::s32, size),
                     TensorView::vector(targets.data(), DType::s32, size),
                     TensorView::vector(log_probs.data(), DType::f32, size),
                     TensorView::vector(greedy.data(), DType::u8, size));
      for (std::size_t i = 0; i < rows.size(); ++i) {
        const float* x = first + rows[i] * vocab;
        const float* top = std::max_element(x, x + vocab);
        double sum = 0.0;
        for (std::int64_t v = 0; v < vocab; ++v) sum += std::exp(double{x[v]} - double{*top});
        const double distance = double{*top} - double{x[targets[i]]}, exact = -distance - std::log(sum);
        CHECK(std::abs(double{log_probs[i]} - exact) <= std::ldexp(1.0 + distance, -20));
        CHECK((greedy[i] != 0) == (top - x == targets[i]));
      }
    }
  }
}

namespace {

struct Scores {
  std::vector<float> log_probs;
  std::vector<std::uint8_t> greedy;
};

// What LogSoftmax finds in logits [rows, vocab] that come in pieces of `at_once` entries.
Scores score_pieces(std::vector<float>& logits, std::int64_t vocab, std::int64_t at_once,
                    std::vector<std::int32_t>& rows, std::vector<std::int32_t>& targets) {
  const auto size = std::ssize(rows);
  LogSoftmax softmax(TensorView::vector(rows.data(), DType::s32, size),
                     TensorView::vector(targets.data(), DType::s32, size), vocab);
  for (std::int64_t first = 0; first < vocab; first += at_once) {
    TensorView piece = TensorView::matrix(logits.data(), DType::f32, std::ssize(logits) / vocab, vocab);
    piece.data = logits.data() + first;
    piece.shape[1] = std::min(at_once, vocab - first);
    softmax.add(piece);
  }
  Scores found{std::vector<float>(rows.size()), std::vector<std::uint8_t>(rows.size())};
  softmax.finish(TensorView::vector(found.log_probs.data(), DType::f32, size),
                 TensorView::vector(found.greedy.data(), DType::u8, size));
  return found;
}

}  // namespace

TEST_CASE("log-softmax of logits in pieces is that of whole rows", "[decoder_ops]") {
  constexpr std::int64_t kVocab = 300;
  const float infinity = std::numeric_limits<float>::infinity();
  Random random(41);
  std::vector<float> logits(5 * kVocab);
  for (float& value : logits) value = 8.0f * random.normal();
  // Equal largest logits in one piece and in two, and a piece of no weight.
  logits[20] = logits[22] = logits[250] = 90.0f;
  std::fill_n(logits.begin() + kVocab, 130, -infinity);
  std::fill_n(logits.begin() + 3 * kVocab, kVocab, -infinity);
  // A NaN among logits of no weight.
  std::fill_n(logits.begin() + 4 * kVocab + 64, 64, -infinity);
  logits[4 * kVocab + 70] = std::numeric_limits<float>::quiet_NaN();
  std::vector<std::int32_t> rows = {0, 0, 0, 0, 1, 1, 2, 3, 3, 4}, targets = {20, 22, 250, 7, 129, 131, 299, 0, 5, 9};
  const Scores whole = score_pieces(logits, kVocab, kVocab, rows, targets);
  CHECK(whole.greedy[0] == 1);
  CHECK(whole.log_probs[4] == -infinity);
  CHECK(whole.greedy[7] == 1);
  CHECK(std::isnan(whole.log_probs[9]));
  for (const std::int64_t at_once : {1, 21, 64, 299}) {
    CAPTURE(at_once);
    const Scores found = score_pieces(logits, kVocab, at_once, rows, targets);
    CHECK(found.greedy == whole.greedy);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const float mine = found.log_probs[i], theirs = whole.log_probs[i];
      const bool same = mine == theirs || (std::isnan(mine) && std::isnan(theirs));
      CHECK((same || std::abs(mine - theirs) <= std::ldexp(1.0f + std::abs(theirs), -20)));
    }
  }
}

TEST_CASE("pieces of logits that do not make up the vocabulary are refused", "[decoder_ops]") {
  std::vector<std::int32_t> rows = {0}, targets = {2};
  std::vector<float> logits(8);
  LogSoftmax softmax(TensorView::vector(rows.data(), DType::s32, 1), TensorView::vector(targets.data(), DType::s32, 1),
                     6);
  softmax.add(TensorView::matrix(logits.data(), DType::f32, 1, 0));
  softmax.add(TensorView::matrix(logits.data(), DType::f32, 1, 4));
  std::vector<std::uint8_t> greedy(1);
  CHECK(input_error_of([&] {
          softmax.finish(TensorView::vector(logits.data(), DType::f32, 1),
                         TensorView::vector(greedy.data(), DType::u8, 1));
        }).find("logits of 4 entries came, but there are 6") != std::string::npos);
  CHECK(input_error_of([&] {
          softmax.add(TensorView::matrix(logits.data(), DType::f32, 1, 3));
        }).find("logits of 3 entries come after 4 of 6") != std::string::npos);
}

TEST_CASE("of equal logits only the first is greedy", "[decoder_ops]") {
  std::vector<float> logits = {1.0f, 3.0f, 3.0f, 2.0f}, log_probs(4);
  std::vector<std::int32_t> rows(4), targets = {0, 1, 2, 3};
  std::vector<std::uint8_t> greedy(4);
  log_softmax_at(TensorView::matrix(logits.data(), DType::f32, 1, 4), TensorView::vector(rows.data(), DType::s32, 4),
                 TensorView::vector(targets.data(), DType::s32, 4), TensorView::vector(log_probs.data(), DType::f32, 4),
                 TensorView::vector(greedy.data(), DType::u8, 4));
  CHECK(greedy == std::vector<std::uint8_t>{0, 1, 0, 0});
}

}  // namespace qtale::test

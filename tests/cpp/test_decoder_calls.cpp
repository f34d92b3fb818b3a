// Calls of the decoder: how they end early, what they report, and texts that come in parts.
#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "catch.h"
#include "engine/head.h"
#include "tiny_decoder.h"

namespace qtale::test {
namespace {

std::int64_t sum(const std::vector<std::int64_t>& values) {
  return std::accumulate(values.begin(), values.end(), std::int64_t{0});
}

// Logits after all tokens of two texts that come in parts of 7, as many of both in a call as fit in 11.
std::array<Logits, 2> in_parts(Decoder& decoder, const std::array<std::vector<std::int32_t>, 2>& texts) {
  std::array<Logits, 2> logits;
  std::array<std::int64_t, 2> sequences{decoder.add_sequence(), decoder.add_sequence()};
  std::array<std::size_t, 2> read{};
  while (read[0] < texts[0].size() || read[1] < texts[1].size()) {
    std::vector<Segment> segments;
    std::size_t room = 11;
    std::vector<std::size_t> members;
    for (std::size_t i = 0; i < 2; ++i) {
      const std::size_t count = std::min({room, std::size_t{7}, texts[i].size() - read[i]});
      if (count == 0) continue;
      segments.push_back(
          {sequences[i], -1, std::span(texts[i]).subspan(read[i], count), static_cast<std::int64_t>(texts[i].size())});
      members.push_back(i);
      read[i] += count;
      room -= count;
    }
    const Logits part = run(decoder, segments);
    std::int64_t row = 0;
    for (std::size_t s = 0; s < members.size(); ++s) {
      Logits& to = logits[members[s]];
      const auto count = std::ssize(segments[s].tokens);
      to.values.insert(to.values.end(), part.row(row), part.row(row + count));
      to.rows += count;
      row += count;
    }
  }
  for (const std::int64_t sequence : sequences) decoder.remove_sequence(sequence);
  return logits;
}

}  // namespace

TEST_CASE("dynamic rotary positions go by the whole text, in parts and in batches too", "[decoder]") {
  const TinyDecoder model({.seed = 21});
  DecoderSpec spec = model.spec();
  spec.rope.dynamic_base = 10000.0;
  spec.rope.dynamic_factor = 4.0;
  spec.rope.dynamic_length = 16;
  Decoder decoder(spec);
  const std::array texts{random_tokens(21, 45), random_tokens(22, 12)};
  const std::array whole{run_alone(decoder, texts[0]), run_alone(decoder, texts[1])};
  const auto parts = in_parts(decoder, texts);
  for (std::size_t i = 0; i < 2; ++i) CHECK(different_rows(parts[i], 0, whole[i], 0, std::ssize(texts[i])) == 0);
  // Without the length of the text its beginning has the positions of a shorter one.
  CHECK(different_rows(run_alone(decoder, texts[0], 7), 0, whole[0], 0, 45) > 0);
}

TEST_CASE("a call that is ended at any place leaves no trace", "[decoder]") {
  const TinyDecoder model({.seed = 23, .vocab = 4224});
  Decoder decoder(model.spec());
  const auto tokens = random_tokens(23, 9);
  const std::vector<std::int64_t> keep{2, 8};
  const std::vector<std::int32_t> targets{1, 5};
  const std::int64_t sequence = decoder.add_sequence();
  const std::vector<Segment> segments{{sequence, -1, tokens}};
  std::vector<float> values(2 * 4224);
  const auto logits = TensorView::matrix(values.data(), DType::f32, 2, 4224);
  int polls = 0, last = 0;
  const auto poll = [&] {
    if (++polls == last) throw std::runtime_error("enough");
  };
  const auto ended_everywhere = [&](const auto& call) {
    polls = last = 0;
    call();
    decoder.truncate(sequence, 0);
    const int all = polls;
    for (last = 1; last <= all; ++last) {
      polls = 0;
      CHECK_THROWS_WITH(call(), "enough");
      CHECK(decoder.length(sequence) == 0);
      CHECK(sum(decoder.kv_bytes()) == 0);
    }
    return all;
  };
  const auto layers = static_cast<int>(model.spec().layers.size());
  CHECK(ended_everywhere([&] { decoder.forward(segments, keep, logits, poll); }) > layers);
  CHECK(ended_everywhere([&] { decoder.score(segments, keep, targets, poll); }) > layers);
}

TEST_CASE("pages that sequences share count in parts", "[decoder]") {
  const TinyDecoder model({.seed = 24});
  Decoder decoder(model.spec());
  const auto tokens = random_tokens(24, 40), more = random_tokens(25, 3);
  const std::int64_t parent = decoder.add_sequence(), child = decoder.add_sequence(), other = decoder.add_sequence();
  run(decoder, {{parent, -1, tokens}, {other, -1, more}});
  const auto bytes = [&](std::vector<std::int64_t> sequences) { return sum(decoder.kv_bytes(sequences)); };
  const std::int64_t page = bytes({other}), alone = bytes({parent});
  CHECK(alone == 3 * page);
  run(decoder, {{child, parent, more}});
  CHECK(bytes({parent, child}) == alone + page);
  CHECK(bytes({parent}) == page + 2 * page / 2);
  CHECK(bytes({child}) == bytes({parent}));
  CHECK(bytes({parent, child, other}) == sum(decoder.kv_bytes()));
  decoder.remove_sequence(parent);
  CHECK(bytes({child}) == alone);
  CHECK(bytes({}) == 0);
}

TEST_CASE("logits come in pieces of the head, the same as at once", "[decoder]") {
  constexpr std::int64_t kRows = 100;
  const auto pieces_of = [](const TinyDecoder::Options& options) {
    const TinyDecoder model(options);
    const std::int64_t hidden = model.spec().hidden_size;
    Random random(27);
    const Floats x = normal_floats(random, DType::f32, kRows * hidden);
    const TensorView rows = x.matrix(kRows, hidden);
    std::vector<float> whole(static_cast<std::size_t>(kRows * options.vocab), NAN), parts = whole;
    int polls = 0;
    const auto logits = [&](std::vector<float>& to) {
      return TensorView::matrix(to.data(), DType::f32, kRows, options.vocab);
    };
    engine::multiply_head(rows, model.spec(), logits(whole), {});
    engine::multiply_head(rows, model.spec(), logits(parts), [&] { ++polls; }, 1);
    CHECK(parts == whole);
    return polls;
  };
  CHECK(pieces_of({.seed = 27, .vocab = 4224}) == 2);                   // packed: 64 and 36 rows
  CHECK(pieces_of({.seed = 28, .packed = false, .vocab = 4224}) == 3);  // 2048, 2048 and 128 tokens
  CHECK(pieces_of({.seed = 29, .packed = false, .vocab = 4224, .dense_dtype = DType::bf16}) == 3);
}

TEST_CASE("a report names the rows that executed each layer", "[decoder]") {
  const TinyDecoder model({.seed = 26, .routers = true});
  Decoder decoder(model.spec());
  const auto tokens = random_tokens(26, 50);
  run_alone(decoder, tokens);
  const auto whole = decoder.report().executed;
  CHECK(counts(decoder.report())[0] == 50);
  CHECK(counts(decoder.report())[1] > 2);
  CHECK(counts(decoder.report())[1] < 50);
  // Alone and in two parts the same tokens decide the same.
  const std::int64_t sequence = decoder.add_sequence();
  run(decoder, {{sequence, -1, std::span(tokens).first(30)}});
  auto parts = decoder.report().executed;
  run(decoder, {{sequence, -1, std::span(tokens).subspan(30)}});
  for (std::size_t layer = 0; layer < parts.size(); ++layer)
    for (const std::int32_t row : decoder.report().executed[layer]) parts[layer].push_back(row + 30);
  CHECK(parts == whole);
}

}  // namespace qtale::test

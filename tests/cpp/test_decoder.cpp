// The decoder: what it computes does not depend on how tokens are brought to it, on threads, or on failed calls.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <numeric>
#include <thread>

#include "catch.h"
#include "tiny_decoder.h"

namespace qtale::test {
namespace {

std::vector<TinyDecoder::Options> all_options() {
  std::vector<TinyDecoder::Options> options = {{},
                                               {.seed = 2, .packed = false},
                                               {.seed = 3, .kv_dtype = DType::f16},
                                               {.seed = 4, .window = 5},
                                               {.seed = 5, .routers = true},
                                               {.seed = 6, .packed = false, .routers = true, .window = 7},
                                               {.seed = 7, .routers = true, .kv_rule = KvRule::keep}};
  if (has_int8_keys(16)) {
    options.push_back({.seed = 10, .window = 5, .kv_dtype = DType::s8});
    options.push_back({.seed = 11, .routers = true, .window = 7, .kv_dtype = DType::s8});
    options.push_back({.seed = 12, .routers = true, .kv_rule = KvRule::keep, .kv_dtype = DType::s8});
  }
  return options;
}

std::int64_t used_bytes(const Decoder& decoder) {
  const auto bytes = decoder.kv_bytes();
  return std::accumulate(bytes.begin(), bytes.end(), std::int64_t{0});
}

bool says(const std::string& message, const std::string& part) { return message.find(part) != std::string::npos; }

bool all_finite(const Logits& logits) {
  return std::all_of(logits.values.begin(), logits.values.end(), [](float v) { return std::isfinite(v); });
}

}  // namespace

TEST_CASE("chunks, single tokens and batches give the bits of one call", "[decoder]") {
  for (const auto& options : all_options()) {
    CAPTURE(options.seed);
    const TinyDecoder model(options);
    Decoder decoder(model.spec());
    const auto first = random_tokens(1, 37), second = random_tokens(2, 18), third = random_tokens(3, 1);
    const Logits whole = run_alone(decoder, first), other = run_alone(decoder, second);
    CHECK(all_finite(whole));
    CHECK(different_rows(whole, 0, run_alone(decoder, first, 16), 0, 37) == 0);
    CHECK(different_rows(whole, 0, run_alone(decoder, first, 1), 0, 37) == 0);
    const std::int64_t a = decoder.add_sequence(), b = decoder.add_sequence(), c = decoder.add_sequence();
    const Logits batch = run(decoder, {{a, -1, first}, {b, -1, {}}, {c, -1, second}});
    CHECK(different_rows(batch, 0, whole, 0, 37) == 0);
    CHECK(different_rows(batch, 37, other, 0, 18) == 0);
    const Logits step = run(decoder, {{c, -1, third}, {b, -1, third}});
    CHECK(different_rows(step, 1, run_alone(decoder, third), 0, 1) == 0);
    CHECK(decoder.length(c) == 19);
    for (const std::int64_t sequence : {a, b, c}) decoder.remove_sequence(sequence);
    CHECK(used_bytes(decoder) == 0);
  }
}

TEST_CASE("layers of dense matrices round nothing, whatever the mode", "[decoder]") {
  const TinyDecoder dense({.packed = false}), packed({.packed = true});
  const auto tokens = random_tokens(31, 40);
  const auto differ = [&](const DecoderSpec& given) {
    DecoderSpec spec = given;
    spec.compute = Compute::int8;
    Decoder fast(spec);
    spec.compute = Compute::floating;
    Decoder exact(spec);
    const Logits logits = run_alone(fast, tokens);
    return different_rows(logits, 0, run_alone(exact, tokens), 0, logits.rows);
  };
  CHECK(differ(dense.spec()) == 0);
  CHECK(differ(packed.spec()) > 0);
}

TEST_CASE("branches take over what their parent holds", "[decoder]") {
  for (const auto& options : all_options()) {
    CAPTURE(options.seed);
    const TinyDecoder model(options);
    Decoder decoder(model.spec());
    const auto tokens = random_tokens(4, 30), ending = random_tokens(5, 9);
    std::vector<std::int32_t> joined(tokens.begin(), tokens.begin() + 21);
    joined.insert(joined.end(), ending.begin(), ending.end());
    const Logits straight = run_alone(decoder, tokens), branched = run_alone(decoder, joined);
    const std::span<const std::int32_t> all(tokens);
    const std::int64_t root = decoder.add_sequence(), left = decoder.add_sequence(), right = decoder.add_sequence();
    const Logits found =
        run(decoder, {{root, -1, all.first(21)}, {left, root, all.subspan(21)}, {right, root, ending}});
    CHECK(different_rows(found, 0, straight, 0, 30) == 0);
    CHECK(different_rows(found, 30, branched, 21, 9) == 0);
    const std::int64_t shared = used_bytes(decoder);
    decoder.remove_sequence(root);
    decoder.remove_sequence(right);
    CHECK(used_bytes(decoder) < shared);
    // What is left is what one sequence of its own holds, and it can go on.
    decoder.truncate(left, 25);
    CHECK(different_rows(run(decoder, {{left, -1, all.subspan(25)}}), 0, straight, 25, 5) == 0);
  }
}

TEST_CASE("a failed call leaves no trace", "[decoder]") {
  const TinyDecoder model({.seed = 5, .routers = true});
  Decoder decoder(model.spec());
  const auto tokens = random_tokens(6, 40);
  const std::span<const std::int32_t> all(tokens);
  const Logits expected = run_alone(decoder, tokens);
  const std::int64_t sequence = decoder.add_sequence(), child = decoder.add_sequence();
  run(decoder, {{sequence, -1, all.first(20)}});
  const std::int64_t before = used_bytes(decoder);
  const std::vector<Segment> segments = {{sequence, -1, all.subspan(20)}, {child, sequence, all.first(3)}};
  for (int layers = 0; layers < 3; ++layers) {
    int left = layers;
    const auto stop = [&] {
      if (left-- == 0) throw std::runtime_error("stopped");
    };
    CHECK_THROWS_AS(decoder.forward(segments, {}, TensorView::matrix(nullptr, DType::f32, 0, kVocab), stop),
                    std::runtime_error);
    CHECK(decoder.length(sequence) == 20);
    CHECK(decoder.length(child) == 0);
    CHECK(used_bytes(decoder) == before);
  }
  CHECK(different_rows(run(decoder, {{sequence, -1, all.subspan(20)}}), 0, expected, 20, 20) == 0);
}

TEST_CASE("results do not depend on threads or on what else is kept", "[decoder][threads]") {
  for (const auto& options : all_options()) {
    CAPTURE(options.seed);
    const TinyDecoder model(options);
    Decoder decoder(model.spec());
    const auto tokens = random_tokens(7, 60);
    const ThreadScope one(1);
    const Logits expected = run_alone(decoder, tokens);
    const ThreadScope three(3);
    CHECK(different_rows(run_alone(decoder, tokens), 0, expected, 0, 60) == 0);
    const std::vector<std::int64_t> keep = {0, 17, 59};
    Logits some{3, Lines<float>(3 * kVocab)};
    const std::int64_t sequence = decoder.add_sequence();
    decoder.forward(std::vector<Segment>{{sequence, -1, tokens}}, keep,
                    TensorView::matrix(some.values.data(), DType::f32, 3, kVocab));
    for (std::int64_t i = 0; i < 3; ++i)
      CHECK(different_rows(some, i, expected, keep[static_cast<std::size_t>(i)], 1) == 0);
  }
}

TEST_CASE("decoders that share the threads of a process give the bits they give alone", "[decoder][threads]") {
  const std::vector<TinyDecoder::Options> options = {
      {.seed = 8, .routers = true, .scale = 4},
      {.seed = 9, .packed = false, .window = 30, .kv_dtype = DType::f16, .scale = 4}};
  std::atomic<std::int64_t> different{0};
  const auto compare = [&different](const TinyDecoder& model, const Logits& expected, int threads) {
    Decoder decoder(model.spec());
    decoder.set_num_threads(threads);
    const auto tokens = random_tokens(11, 100);
    for (const std::size_t chunk : {1000, 70})
      different += different_rows(run_alone(decoder, tokens, chunk), 0, expected, 0, 100);
  };
  for (const int threads : {2, 4}) {
    std::vector<TinyDecoder> models(options.begin(), options.end());
    std::vector<std::thread> callers;
    for (const TinyDecoder& model : models) {
      Decoder decoder(model.spec());
      decoder.set_num_threads(1);
      const Logits expected = run_alone(decoder, random_tokens(11, 100));
      for (int caller = 0; caller < 2; ++caller)
        callers.emplace_back([&, expected] { compare(model, expected, threads); });
    }
    for (auto& caller : callers) caller.join();
  }
  CHECK(different == 0);
}

TEST_CASE("routing: thresholds, forced tokens, depth and what is stored", "[decoder]") {
  for (const KvRule rule : {KvRule::evict, KvRule::keep}) {
    const TinyDecoder model({.seed = 9, .routers = true, .kv_rule = rule});
    Decoder decoder(model.spec());
    const auto tokens = random_tokens(9, 64);
    const auto executed = [&](float theta, std::int64_t forced) {
      decoder.set_theta(theta);
      decoder.set_forced_tokens(forced);
      run_alone(decoder, tokens);
      return counts(decoder.report());
    };
    CHECK(executed(0.0F, 0) == std::vector<std::int64_t>{64, 64, 64});
    CHECK(executed(1.0F, 0) == std::vector<std::int64_t>{64, 0, 0});
    CHECK(executed(1.0F, 3) == std::vector<std::int64_t>{64, 3, 3});
    const auto some = executed(0.5F, 2);
    CHECK(some[1] > 5);
    CHECK(some[1] < 60);
    CHECK(executed(0.4F, 2)[1] >= some[1]);
    const std::int64_t sequence = decoder.add_sequence();
    run(decoder, {{sequence, -1, tokens}});
    const auto bytes = decoder.kv_bytes(std::array{sequence});
    const std::int64_t page = bytes[0] / 4, kept = counts(decoder.report())[1];
    CHECK(bytes[1] == (rule == KvRule::keep ? bytes[0] : (kept + kPageTokens - 1) / kPageTokens * page));
    CHECK(std::is_sorted(decoder.report().executed[1].begin(), decoder.report().executed[1].end()));
  }
}

TEST_CASE("a static depth is the decoder without the other layers", "[decoder]") {
  const TinyDecoder model({.seed = 10});
  Decoder decoder(model.spec());
  DecoderSpec fewer = model.spec();
  fewer.layers.erase(fewer.layers.begin() + 1);
  Decoder small(fewer);
  const auto tokens = random_tokens(10, 33);
  decoder.set_depth(std::vector<bool>{true, false, true});
  CHECK(different_rows(run_alone(decoder, tokens), 0, run_alone(small, tokens), 0, 33) == 0);
  CHECK(counts(decoder.report()) == std::vector<std::int64_t>{33, 0, 33});
  decoder.set_depth(std::nullopt);
  run_alone(decoder, tokens);
  CHECK(counts(decoder.report()) == std::vector<std::int64_t>{33, 33, 33});
}

TEST_CASE("the decoder refuses what it cannot run", "[decoder]") {
  const TinyDecoder model({});
  Decoder decoder(model.spec());
  const std::int64_t sequence = decoder.add_sequence(), other = decoder.add_sequence();
  const auto tokens = random_tokens(11, 129);
  const std::vector<std::int32_t> wild = {1, kVocab}, negative = {-1};
  const auto refusal = [&](const std::vector<Segment>& segments) {
    return input_error_of([&] { run(decoder, segments); });
  };
  CHECK(says(refusal({{sequence, -1, tokens}}), "exceed the context of 128"));
  CHECK(says(refusal({{sequence, -1, wild}}), "token id 61"));
  CHECK(says(refusal({{sequence, -1, negative}}), "token id -1"));
  CHECK(says(refusal({{99, -1, {}}}), "no sequence 99"));
  CHECK(says(refusal({{sequence, 99, {}}}), "no sequence 99"));
  const std::span<const std::int32_t> few = std::span(tokens).first(4);
  CHECK(says(refusal({{sequence, -1, few}, {sequence, -1, few}}), "two segments"));
  run(decoder, {{sequence, -1, few}});
  CHECK(says(refusal({{sequence, other, few}}), "not empty"));
  CHECK(says(input_error_of([&] { decoder.truncate(sequence, 5); }), "cannot be cut to 5"));
  CHECK(says(input_error_of([&] { decoder.set_depth(std::vector<bool>{true}); }), "1 decisions"));
  CHECK(says(input_error_of([&] { decoder.set_theta(2.0F); }), "theta"));
  CHECK(decoder.length(sequence) == 4);

  DecoderSpec broken = model.spec();
  broken.num_kv_heads = 4;
  CHECK(says(input_error_of([&] { Decoder{broken}; }), "share 4 key-value heads"));
  broken = model.spec();
  broken.layers[1].o = broken.layers[1].down;
  CHECK(says(input_error_of([&] { Decoder{broken}; }), "layer 1.o takes 160 features"));
  broken = model.spec();
  broken.layers[2].qkv.pop_back();
  CHECK(says(input_error_of([&] { Decoder{broken}; }), "layer 2.qkv has 96 outputs"));
}

}  // namespace qtale::test

// Weights in tiles: bit for bit the products of those in rows.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "catch.h"
#include "guarded.h"
#include "tiled.h"
#include "tiny_decoder.h"

namespace qtale::test {
namespace {

// Within one tile of rows, within one panel, and in several.
constexpr std::int64_t kRows[] = {0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 70, 300};

std::uint16_t bits_of(float value) {
  Floats one(DType::bf16, 1);
  one.set(0, value);
  return static_cast<std::uint16_t>(one.bits(0));
}

}  // namespace

TEST_CASE("round_weights: the nearest numbers in rows, and in tiles where their text says") {
  constexpr Size kSize{48, 96};
  Random random(201);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    if (!has_bfloat16()) continue;
    for (const DType dtype : kFloatTypes) {
      const Floats weight = normal_floats(random, dtype, kSize.out * kSize.in);
      Floats rows(DType::bf16, weight.size()), tiles(DType::bf16, weight.size());
      round_weights(weight.matrix(kSize.out, kSize.in), rows.matrix(kSize.out, kSize.in));
      if (takes_tiles(isa)) round_weights(weight.matrix(kSize.out, kSize.in), tiles_of(tiles, kSize));
      std::int64_t wrong = 0;
      for (std::int64_t o = 0; o < kSize.out; ++o)
        for (std::int64_t i = 0; i < kSize.in; ++i) {
          const std::uint16_t expected = bits_of(weight.get(o * kSize.in + i));
          wrong += rows.bits(o * kSize.in + i) != expected;
          const std::int64_t tile = o / 16 * (kSize.in / 32) + i / 32;
          if (takes_tiles(isa)) wrong += tiles.bits(tile * 512 + i % 32 / 2 * 32 + o % 16 * 2 + i % 2) != expected;
        }
      INFO(isa << " " << name_of(dtype));
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("round_weights: tiles may begin anywhere") {
  constexpr Size kSize{32, 64};
  Random random(207);
  const Floats weight = normal_floats(random, DType::f32, kSize.out * kSize.in);
  with_tiles(0, [&](const std::string& isa) {
    Floats moved(DType::bf16, weight.size() + 8), expected = tiled(weight, kSize);
    auto* const place = static_cast<std::byte*>(moved.data()) + 2 * 5;
    round_weights(weight.matrix(kSize.out, kSize.in), tiles_of(place, kSize));
    INFO(isa);
    CHECK(std::memcmp(place, expected.data(), static_cast<std::size_t>(2 * weight.size())) == 0);
    for (const std::int64_t rows : {3, 40}) {
      const Floats x = normal_floats(random, DType::f32, rows * kSize.in);
      const TensorView in = x.matrix(rows, kSize.in);
      CHECK(first_difference(product(in, tiles_of(place, kSize), nullptr, rows, kSize.out),
                             product(in, tiles_of(expected, kSize), nullptr, rows, kSize.out)) == -1);
    }
  });
}

TEST_CASE("round_weights: rows may be apart and of any even length; NaN stays, tiny numbers become zero") {
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    if (!has_bfloat16()) continue;
    for (const std::int64_t in : {2, 30, 32, 34, 100}) {
      Floats weight(DType::f32, 3 * (in + 3)), out(DType::bf16, 3 * in);
      for (std::int64_t i = 0; i < weight.size(); ++i) weight.set(i, static_cast<float>(i) + 0.37f);
      weight.set(0, NAN);
      weight.set(1, -1e-40f);
      TensorView view = weight.matrix(3, in + 3);
      view.shape[1] = in;
      round_weights(view, out.matrix(3, in));
      std::int64_t wrong = !std::isnan(out.get(0)) || out.bits(1) != 0x8000;
      for (std::int64_t i = 2; i < out.size(); ++i)
        wrong += out.bits(i) != bits_of(weight.get(i / in * (in + 3) + i % in));
      INFO(isa << " " << in);
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("matmul: weights in tiles give the bits of those in rows") {
  Random random(202);
  int turn = 0;
  for (const Size& size : kSizes)
    for (const std::int64_t rows : kRows) {
      const Floats weight = normal_floats(random, kFloatTypes[turn++ % 3], size.out * size.in);
      const Floats bias = normal_floats(random, DType::f32, size.out);
      const Floats x = normal_floats(random, DType::f32, rows * size.in), half = rounded(x);
      with_tiles(rows * size.out * size.in, [&](const std::string& isa) {
        Floats tiles = tiled(weight, size);
        const TensorView in_rows = weight.matrix(size.out, size.in), in_tiles = tiles_of(tiles, size);
        const TensorView as_is = x.matrix(rows, size.in), as_bf16 = half.matrix(rows, size.in);
        for (const Floats* b : {static_cast<const Floats*>(nullptr), &bias}) {
          const Floats expected = product(as_is, in_rows, b, rows, size.out);
          INFO(isa << " " << rows << " rows, " << size.out << " x " << size.in << (b ? ", bias" : ""));
          CHECK(first_difference(product(as_is, in_tiles, b, rows, size.out), expected) == -1);
          CHECK(first_difference(product(as_bf16, in_tiles, b, rows, size.out), expected) == -1);
          CHECK(first_difference(product(as_bf16, in_rows, b, rows, size.out), expected) == -1);
        }
      });
    }
}

TEST_CASE("matmul: NaN and infinity in tiles reach their own products only") {
  constexpr Size kSize{48, 96};
  with_tiles(0, [&](const std::string& isa) {
    Floats weight(DType::f32, kSize.out * kSize.in);
    for (std::int64_t i = 0; i < weight.size(); ++i) weight.set(i, 1.0f);
    weight.set(5 * kSize.in + 33, NAN);
    weight.set(47 * kSize.in + 95, std::numeric_limits<float>::infinity());
    Floats tiles = tiled(weight, kSize);
    for (const std::int64_t rows : {2, 20, 70}) {
      Floats x(DType::f32, rows * kSize.in);
      for (std::int64_t i = 0; i < x.size(); ++i) x.set(i, 1.0f);
      const Floats y = product(x.matrix(rows, kSize.in), tiles_of(tiles, kSize), nullptr, rows, kSize.out);
      std::int64_t wrong = 0;
      for (std::int64_t i = 0; i < y.size(); ++i) {
        const std::int64_t o = i % kSize.out;
        wrong += o == 5 ? !std::isnan(y.get(i)) : o == 47 ? !std::isinf(y.get(i)) : y.get(i) != 96.0f;
      }
      INFO(isa << " " << rows << " rows");
      CHECK(wrong == 0);
    }
  });
}

TEST_CASE("matmul: weights in tiles, the same bits for any number of threads", "[amx][threads]") {
  if (!has_amx()) return;
  const IsaScope scope("avx512_amx");
  Random random(203);
  constexpr Size kSize{1040, 1408};
  const Floats weight = normal_floats(random, DType::bf16, kSize.out * kSize.in);
  Floats tiles = tiled(weight, kSize);
  for (const std::int64_t rows : {1, 20, 100}) {
    const Floats x = normal_floats(random, DType::f32, rows * kSize.in);
    const Floats expected = product(x.matrix(rows, kSize.in), weight.matrix(kSize.out, kSize.in), nullptr, rows, 1040);
    for (const int count : {1, 2, 3, 7}) {
      const ThreadScope threads(count);
      INFO(rows << " rows, " << count << " threads");
      CHECK(first_difference(product(x.matrix(rows, kSize.in), tiles_of(tiles, kSize), nullptr, rows, 1040),
                             expected) == -1);
    }
  }
}

#ifdef __linux__
TEST_CASE("amx: products with weights in tiles end where their memory does", "[amx]") {
  if (!has_amx()) return;
  const IsaScope scope("avx512_amx");
  Random random(206);
  for (const Size& size : {Size{16, 32}, Size{48, 64}, Size{80, 608}})
    for (const std::int64_t rows : {1, 5, 16, 17, 32, 33, 64, 65}) {
      const Floats weight = normal_floats(random, DType::bf16, size.out * size.in);
      const Floats x = rounded(normal_floats(random, DType::f32, rows * size.in));
      Floats tiles = tiled(weight, size);
      const Floats expected = product(x.matrix(rows, size.in), tiles_of(tiles, size), nullptr, rows, size.out);
      const Guarded own_x(x.data(), x.size() * 2), own(tiles.data(), tiles.size() * 2), y(expected.size() * 4);
      matmul(TensorView::matrix(own_x.data(), DType::bf16, rows, size.in), tiles_of(own.data(), size), nullptr,
             TensorView::matrix(y.data(), DType::f32, rows, size.out), Compute::bfloat16);
      INFO(rows << " rows, " << size.out << " x " << size.in);
      CHECK(std::memcmp(y.data(), expected.data(), static_cast<std::size_t>(expected.size() * 4)) == 0);
    }
}
#endif

TEST_CASE("decoder: matrices in tiles give the bits of those in rows", "[amx][decoder]") {
  if (!has_amx()) return;
  const IsaScope scope("avx512_amx");
  for (const bool routers : {false, true}) {
    TinyDecoder::Options options;
    options.packed = false;
    options.routers = routers;
    options.dense_dtype = DType::bf16;
    options.biases = false;
    options.vocab = 64;
    const TinyDecoder in_rows(options);
    options.tiled = true;
    const TinyDecoder in_tiles(options);
    DecoderSpec specs[] = {in_rows.spec(), in_tiles.spec()};
    std::vector<Lines<float>> logits;
    std::vector<std::vector<Score>> scores;
    const std::vector<std::int32_t> tokens = random_tokens(8, 90);
    for (DecoderSpec& spec : specs) {
      spec.compute = Compute::bfloat16;
      Decoder decoder(spec);
      const std::int64_t long_one = decoder.add_sequence(), short_one = decoder.add_sequence();
      const std::vector<std::int64_t> keep{0, 40, 88, 89};
      const std::vector<std::int32_t> targets{3, 5, 63, 0};
      scores.push_back(decoder.score(std::vector<Segment>{{long_one, -1, tokens}}, keep, targets));
      logits.emplace_back(20 * 64);
      std::vector<std::int64_t> all(20);
      for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::int64_t>(i);
      decoder.forward(std::vector<Segment>{{short_one, -1, std::span(tokens).first(20)}}, all,
                      TensorView::matrix(logits.back().data(), DType::f32, 20, 64));
    }
    CHECK(logits[0] == logits[1]);
    for (std::size_t i = 0; i < scores[0].size(); ++i) CHECK(scores[0][i].log_prob == scores[1][i].log_prob);
  }
}

TEST_CASE("matmul: weights in tiles and x in bf16 are refused where they cannot be multiplied") {
  constexpr Size kSize{16, 32};
  Floats x(DType::f32, 64), half(DType::bf16, 64), weight(DType::bf16, 512), y(DType::f32, 32);
  const auto refused = [&](const TensorView& x_view, const TensorView& weight_view, Compute compute) {
    return input_error_of([&] { matmul(x_view, weight_view, nullptr, y.matrix(2, 16), compute); });
  };
  const TensorView tiles = tiles_of(weight, kSize), rows = weight.matrix(16, 32);
  TensorView wrong = tiles;
  wrong.shape[2] = 8;
  TensorView empty = tiles;
  empty.shape[1] = 0;
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    INFO(isa);
    CHECK(refused(x.matrix(2, 32), tiles, Compute::floating).find("weights in tiles are for compute bfloat16") !=
          std::string::npos);
    CHECK(refused(half.matrix(2, 32), rows, Compute::floating).find("x in bfloat16 is for compute bfloat16") !=
          std::string::npos);
    CHECK(refused(x.matrix(2, 32), wrong, Compute::bfloat16).find("expected tiles [out / 16") != std::string::npos);
    CHECK(refused(x.matrix(2, 0), empty, Compute::bfloat16).find("of some inputs") != std::string::npos);
    if (!has_bfloat16()) continue;
    CHECK(refused(x.matrix(2, 32), tiles, Compute::bfloat16).empty() == takes_tiles(isa));
    CHECK(refused(half.matrix(2, 32), rows, Compute::bfloat16).empty() == takes_tiles(isa));
    CHECK(refused(x.matrix(4, 16), tiles, Compute::bfloat16) == "matmul: x has 16 features; the weight takes 32.");
    CHECK(input_error_of([&] {
            round_weights(x.matrix(4, 16), tiles);
          }).find("which holds [16, 32]; expected tiles of") != std::string::npos);
    CHECK(input_error_of([&] { round_weights(x.matrix(2, 3), half.matrix(2, 3)); }).find("by pairs") !=
          std::string::npos);
  }
}

}  // namespace qtale::test

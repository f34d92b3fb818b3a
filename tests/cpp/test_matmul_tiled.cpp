// Weights in tiles, and products that go on as they are stored: bit for bit what matmul and the operators after it
// give.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "catch.h"
#include "guarded.h"
#include "qtale/decoder_ops.h"
#include "qtale/device.h"
#include "support.h"
#include "tiny_decoder.h"

namespace qtale::test {
namespace {

struct Size {
  std::int64_t out, in;
};
// One tile, odd numbers of tiles, depths of one block and of several.
constexpr Size kSizes[] = {{16, 32}, {48, 96}, {80, 288}, {96, 576}, {176, 608}, {304, 1408}};
// Within one tile of rows, within one panel, and in several.
constexpr std::int64_t kRows[] = {0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 70, 300};

// The tiers that multiply weights in tiles: the scalar one, and AMX where this CPU has it.
bool takes_tiles(const std::string& isa) { return isa == "reference" || isa == "avx512_amx"; }

// Calls fn(isa) with each of them in use; the scalar one is spared what would take long.
template <class Fn>
void with_tiles(std::int64_t products, Fn&& fn) {
  for (const std::string& isa : cpu_isas()) {
    if (!takes_tiles(isa) || (isa == "reference" && products > 1'000'000)) continue;
    const IsaScope scope(isa);
    fn(isa);
  }
}

bool has_amx() {
  for (const std::string& isa : cpu_isas())
    if (isa == "avx512_amx") return true;
  WARN("skipped: this CPU or its system has no AMX");
  return false;
}

TensorView tiles_of(void* data, const Size& size) {
  TensorView t;
  t.data = data;
  t.dtype = DType::bf16;
  t.rank = 4;
  t.shape = {size.out / kTileOutputs, size.in / kTileInputs, kTileOutputs, kTileInputs};
  t.strides = {size.in * kTileOutputs, kTileOutputs * kTileInputs, kTileInputs, 1};
  return t;
}
TensorView tiles_of(Floats& memory, const Size& size) { return tiles_of(memory.data(), size); }

Floats tiled(const Floats& weight, const Size& size) {
  Floats out(DType::bf16, weight.size());
  round_weights(weight.matrix(size.out, size.in), tiles_of(out, size));
  return out;
}

Floats rounded(const Floats& values) {
  Floats out(DType::bf16, values.size());
  for (std::int64_t i = 0; i < values.size(); ++i) out.set(i, values.get(i));
  return out;
}

Floats product(const TensorView& x, const TensorView& weight, const Floats* bias, std::int64_t rows, std::int64_t out) {
  Floats y(DType::f32, rows * out);
  const TensorView bias_view = bias == nullptr ? TensorView{} : bias->vector();
  matmul(x, weight, bias == nullptr ? nullptr : &bias_view, y.matrix(rows, out), Compute::bfloat16);
  return y;
}

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

TEST_CASE("gated_matmul: weights in tiles and a result in bf16 have the bits of silu_mul") {
  Random random(204);
  for (const Size& size : kSizes)
    for (const std::int64_t rows : {33, 64, 70, 300, 1030}) {
      const Size both_size{2 * size.out, size.in};
      const Floats both = normal_floats(random, DType::f32, both_size.out * size.in, 0.1f);
      const Floats x = normal_floats(random, DType::f32, rows * size.in);
      with_tiles(2 * rows * size.out * size.in, [&](const std::string& isa) {
        Floats tiles = tiled(both, both_size);
        const TensorView in = x.matrix(rows, size.in), in_rows = both.matrix(2 * size.out, size.in);
        const Floats products = product(in, in_rows, nullptr, rows, 2 * size.out);
        Floats expected(DType::f32, rows * size.out);
        silu_mul(products.matrix(rows, 2 * size.out), expected.matrix(rows, size.out));
        const TensorView gates[] = {tiles_of(tiles, size), both.matrix(size.out, size.in)};
        TensorView ups[] = {gates[0], gates[1]};
        for (TensorView& up : ups) up.data = up.as<std::byte>() + size.out * size.in * size_of(up.dtype);
        for (int form = 0; form < 2; ++form) {
          Floats y(DType::f32, rows * size.out), half(DType::bf16, rows * size.out);
          REQUIRE(gated_matmul(in, gates[form], ups[form], y.matrix(rows, size.out), Compute::bfloat16));
          REQUIRE(gated_matmul(in, gates[form], ups[form], half.matrix(rows, size.out), Compute::bfloat16));
          INFO(isa << " " << rows << " rows, " << size.out << " x " << size.in << ", form " << form);
          CHECK(first_difference(y, expected) == -1);
          CHECK(first_difference(half, rounded(expected)) == -1);
        }
      });
    }
}

TEST_CASE("matmul_add: has the bits of matmul and an addition, or does nothing") {
  Random random(205);
  for (const Size& size : {Size{16, 32}, Size{97, 130}, Size{176, 608}, Size{300, 1400}})
    for (const std::int64_t rows : {5, 33, 70, 600}) {
      const Floats weight = normal_floats(random, DType::f16, size.out * size.in);
      const Floats x = normal_floats(random, DType::f32, rows * size.in);
      const Floats before = normal_floats(random, DType::f32, rows * (size.out + 3));
      for (const std::string& isa : cpu_isas()) {
        if (isa == "reference" && rows > 100) continue;
        const IsaScope scope(isa);
        Floats y = before, expected = before;
        TensorView to = y.matrix(rows, size.out + 3);
        to.shape[1] = size.out;
        const bool done = matmul_add(x.matrix(rows, size.in), weight.matrix(size.out, size.in), to, Compute::bfloat16);
        INFO(isa << " " << rows << " rows, " << size.out << " x " << size.in);
        CHECK(done == (isa == "reference" || (isa == "avx512_amx" && rows > 32)));
        if (done) {
          const Floats sums =
              product(x.matrix(rows, size.in), weight.matrix(size.out, size.in), nullptr, rows, size.out);
          for (std::int64_t i = 0; i < sums.size(); ++i) {
            const std::int64_t at = i / size.out * (size.out + 3) + i % size.out;
            expected.set(at, before.get(at) + sums.get(i));
          }
        }
        CHECK(first_difference(y, expected) == -1);
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
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    INFO(isa);
    CHECK(refused(x.matrix(2, 32), tiles, Compute::floating).find("weights in tiles are for compute bfloat16") !=
          std::string::npos);
    CHECK(refused(half.matrix(2, 32), rows, Compute::floating).find("x in bfloat16 is for compute bfloat16") !=
          std::string::npos);
    CHECK(refused(x.matrix(2, 32), wrong, Compute::bfloat16).find("expected tiles [out / 16") != std::string::npos);
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

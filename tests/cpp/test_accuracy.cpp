// The operators end to end: stated bounds against float64, threads, and distortion per bit width as numbers.
#include <cmath>
#include <thread>

#include "catch.h"
#include "engine/workspace.h"
#include "matmul_oracle.h"

namespace qtale::test {
namespace {

Floats multiply(const Weight& weight, const Activations& x, std::int64_t rows, Compute compute) {
  auto buffer = prepacked(weight);
  Floats y(x.values.dtype(), rows * weight.shape.n);
  qmatmul(x.view(rows), view(buffer), nullptr, y.matrix(rows, weight.shape.n), compute);
  return y;
}

// Signal to noise in dB of `actual` as an approximation of `exact`.
double snr(const std::vector<double>& exact, const std::vector<double>& actual) {
  double signal = 0.0, noise = 0.0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    signal += exact[i] * exact[i];
    noise += (exact[i] - actual[i]) * (exact[i] - actual[i]);
  }
  return 10.0 * std::log10(signal / noise);
}

// Gaussian weights through quantize and dequantize.
double codec_snr(int bits, std::int64_t groups, bool symmetric) {
  constexpr std::int64_t kN = 64, kK = 1024;
  Random random(51);
  const Floats weight = normal_floats(random, DType::f32, kN * kK);
  Weight q = quantized(weight, {kN, kK, groups, bits, symmetric, DType::f16});
  Floats back(DType::f32, kN * kK);
  const TensorView zero = view(q.zero, kN, groups);
  dequantize(view(q.codes, kN, kK), q.scale.matrix(kN, groups), symmetric ? nullptr : &zero, back.matrix(kN, kK));
  std::vector<double> exact, actual;
  for (std::int64_t i = 0; i < kN * kK; ++i) {
    exact.push_back(weight.get(i));
    actual.push_back(back.get(i));
  }
  return snr(exact, actual);
}

}  // namespace

TEST_CASE("qmatmul: all modes stay within their stated bounds of the float64 product") {
  Random random(52);
  for (const std::string& isa : cpu_isas()) {
    if (isa == "reference") continue;
    const IsaScope scope(isa);
    for (const int bits : kBits)
      for (const std::int64_t groups : {1, 9, 18})
        for (const bool symmetric : {true, false}) {
          const Shape shape{97, 576, groups, bits, symmetric, DType::f16};
          const Weight weight = quantized(normal_floats(random, DType::f32, 97 * 576, 0.05f), shape);
          const Activations x = normal_activations(random, DType::bf16, 5, 576);
          for (const Compute compute : kModes) {
            INFO(isa << " " << name_of(compute) << " " << shape.text());
            CHECK(compare(expect_exact(weight, x, compute), multiply(weight, x, 5, compute), 5, 97) == "");
          }
        }
  }
}

TEST_CASE("qmatmul: large products over one and several threads", "[threads]") {
  Random random(53);
  constexpr std::int64_t kM = 301, kN = 193, kK = 320;
  const Weight weight = quantized(normal_floats(random, DType::f32, kN * kK, 0.05f), {kN, kK, 5, 4, false, DType::f16});
  const Activations x = normal_activations(random, DType::f32, kM, kK);
  for (const Compute compute : kModes) {
    const Expected expected = expect(weight, x, compute, {});
    for (const std::string& isa : cpu_isas()) {
      if (isa == "reference") continue;
      const IsaScope scope(isa);
      std::vector<Floats> results;
      for (const int threads : {1, 2, 3}) {
        const ThreadScope pool(threads);
        results.push_back(multiply(weight, x, kM, compute));
        INFO(isa << ", " << threads << " threads");
        CHECK(compare(expected, results.back(), kM, kN) == "");
        CHECK(first_difference(results.front(), results.back()) == -1);
      }
    }
  }
}

TEST_CASE("qmatmul: concurrent callers get what one caller gets") {
  Random random(54);
  constexpr std::int64_t kM = 9, kN = 130, kK = 512;
  const Weight weight = quantized(normal_floats(random, DType::f32, kN * kK, 0.05f), {kN, kK, 4, 4, true, DType::f16});
  const Activations x = normal_activations(random, DType::f32, kM, kK);
  const ThreadScope pool(2);
  const Floats expected = multiply(weight, x, kM, Compute::int8);
  constexpr int kCallers = 4;
  std::vector<std::int64_t> differences(kCallers, -1);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller)
    callers.emplace_back([&, caller] {
      for (int turn = 0; turn < 50 && differences[caller] == -1; ++turn)
        differences[caller] = first_difference(expected, multiply(weight, x, kM, Compute::int8));
    });
  for (auto& caller : callers) caller.join();
  CHECK(differences == std::vector<std::int64_t>(kCallers, -1));
}

TEST_CASE("operators: rows split over threads give what one thread gives", "[threads]") {
  Random random(55);
  const Shape shape{257, 1000, 1, 3, false, DType::f32};
  const Floats weight = normal_floats(random, DType::f16, shape.n * shape.k);
  const auto run = [&](int threads) {
    const ThreadScope pool(threads);
    Weight q = quantized(weight, shape);
    Floats fake(DType::f16, weight.size());
    const TensorView zero = view(q.zero, shape.n, 1);
    fake_quantize(weight.matrix(shape.n, shape.k), q.scale.matrix(shape.n, 1), &zero, shape.bits,
                  fake.matrix(shape.n, shape.k));
    return std::pair{std::move(q), std::move(fake)};
  };
  const auto [one, one_fake] = run(1);
  const auto [three, three_fake] = run(3);
  CHECK(one.codes == three.codes);
  CHECK(one.zero == three.zero);
  CHECK(first_difference(one.scale, three.scale) == -1);
  CHECK(first_difference(one_fake, three_fake) == -1);
}

// Gaussian weights, dB; each threshold is 0.3 dB under what round to nearest reaches.
TEST_CASE("codec: distortion per bit width stays above its threshold") {
  CHECK(codec_snr(8, 1, true) > 41.7);
  CHECK(codec_snr(8, 8, true) > 43.4);
  CHECK(codec_snr(4, 1, true) > 17.1);
  CHECK(codec_snr(4, 8, true) > 18.8);
  CHECK(codec_snr(4, 32, true) > 20.1);
  CHECK(codec_snr(4, 8, false) > 19.6);
  CHECK(codec_snr(3, 8, true) > 12.1);
  CHECK(codec_snr(3, 8, false) > 13.0);
  CHECK(codec_snr(2, 32, true) > 6.2);
  CHECK(codec_snr(2, 32, false) > 7.5);
}

TEST_CASE("qmatmul: activations of 8 bits keep 43 dB, of 16 bits 91 dB and exact ones 120 dB") {
  Random random(56);
  const Weight weight = quantized(normal_floats(random, DType::f32, 64 * 1024), {64, 1024, 1, 8, true, DType::f32});
  const Activations x = normal_activations(random, DType::f32, 16, 1024);
  const std::vector<double> exact = expect_exact(weight, x, Compute::floating).y;
  for (const Compute compute : kModes) {
    const Floats y = multiply(weight, x, 16, compute);
    std::vector<double> actual;
    for (std::int64_t i = 0; i < y.size(); ++i) actual.push_back(y.get(i));
    INFO(name_of(compute));
    CHECK(snr(exact, actual) > (compute == Compute::int8 ? 43.5 : compute == Compute::int16 ? 91.0 : 120.0));
  }
}

TEST_CASE("qmatmul: several weights with one input have the bits of single calls") {
  Random random(53);
  constexpr std::int64_t kK = 576, kWide = 400;
  // Alike and not: some share their activations, others do not.
  const Shape shapes[] = {{200, kK, 9, 4, true, DType::f16},
                          {64, kK, 9, 4, true, DType::f16},
                          {1, kK, 9, 4, true, DType::f32},
                          {70, kK, 1, 8, true, DType::f16},
                          {65, kK, 18, 3, false, DType::f16}};
  std::vector<Weight> weights;
  for (const Shape& shape : shapes)
    weights.push_back(quantized(normal_floats(random, DType::f32, shape.n * kK, 0.05f), shape));
  std::vector<float> bias(200, 0.5f);
  const TensorView bias_view = TensorView::vector(bias.data(), DType::f32, 200);
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for (const std::int64_t rows : {1, 7, 130})
      for (const int threads : {1, 3})
        for (const Compute compute : kModes) {
          INFO(isa << ", " << rows << " rows, " << threads << " threads");
          const ThreadScope limit(threads);
          const Activations x = normal_activations(random, DType::f32, rows, kK);
          Floats y(DType::f32, rows * kWide);
          std::vector<std::vector<std::uint8_t>> buffers;
          std::vector<QmatmulWeight> parts;
          std::int64_t column = 0;
          for (const Weight& weight : weights) {
            buffers.push_back(prepacked(weight));
            parts.push_back({view(buffers.back()), column == 0 ? &bias_view : nullptr,
                             engine::columns(y.matrix(rows, kWide), column, weight.shape.n)});
            column += weight.shape.n;
          }
          REQUIRE(column == kWide);
          const std::vector<TensorView> next{parts.back().prepacked, parts.front().prepacked};
          qmatmul(x.view(rows), parts, compute, next);
          std::int64_t wrong = 0;
          for (std::size_t i = 0; i < parts.size(); ++i) {
            const std::int64_t n = parts[i].y.shape[1];
            Floats alone(DType::f32, rows * n);
            qmatmul(x.view(rows), parts[i].prepacked, parts[i].bias, alone.matrix(rows, n), compute);
            for (std::int64_t j = 0; j < rows * n; ++j)
              wrong += alone.get(j) != parts[i].y.as<float>()[j / n * parts[i].y.strides[0] + j % n];
          }
          CHECK(wrong == 0);
        }
  }
}

}  // namespace qtale::test

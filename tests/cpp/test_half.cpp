// 16-bit floats against the formulas of IEEE 754 in double arithmetic, over all of their values.
#include <bit>
#include <cmath>
#include <limits>

#include "catch.h"
#include "core/half.h"
#include "support.h"

namespace qtale::test {
namespace {

// sign * 1.mantissa * 2^(exponent - bias), subnormals and infinities included.
double decode(std::uint16_t bits, int mantissa_bits, int bias) {
  const int exponent_bits = 15 - mantissa_bits, top = (1 << exponent_bits) - 1;
  const double sign = bits & 0x8000u ? -1.0 : 1.0;
  const int exponent = (bits >> mantissa_bits) & top;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  if (exponent == top) return mantissa ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

template <class ToFloat>
int wrong_decodings(ToFloat to_float, int mantissa_bits, int bias) {
  int wrong = 0;
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const double expected = decode(static_cast<std::uint16_t>(bits), mantissa_bits, bias);
    const float value = to_float(static_cast<std::uint16_t>(bits));
    const bool same =
        std::isnan(expected) ? std::isnan(value) : value == expected && std::signbit(value) == std::signbit(expected);
    wrong += !same;
  }
  return wrong;
}

// Each finite value, the midpoint to its successor (a tie, to even) and the floats right beside the midpoint.
template <class FromFloat>
int wrong_roundings(FromFloat from_float, int mantissa_bits, int bias) {
  int wrong = 0;
  const int infinity = ((1 << (15 - mantissa_bits)) - 1) << mantissa_bits;
  for (int bits = 0; bits < infinity; ++bits) {
    const double low = decode(static_cast<std::uint16_t>(bits), mantissa_bits, bias);
    // The successor of the largest finite value is what would follow it, and stands for infinity.
    const double high = bits + 1 == infinity ? std::ldexp(2.0, bias)
                                             : decode(static_cast<std::uint16_t>(bits + 1), mantissa_bits, bias);
    const auto middle = static_cast<float>((low + high) / 2);
    const float below = std::nextafter(middle, 0.0f), above = std::nextafter(middle, INFINITY);
    for (const int sign : {0, 0x8000}) {
      const auto round = [&](float value) { return from_float(sign ? -value : value) ^ sign; };
      wrong += round(static_cast<float>(low)) != bits;
      wrong += round(middle) != bits + (bits & 1);
      wrong += round(below) != bits;
      wrong += round(above) != bits + 1;
    }
  }
  return wrong;
}

}  // namespace

TEST_CASE("half: every float16 and bfloat16 converts to its float32 value") {
  CHECK(wrong_decodings(f16_to_float, 10, 15) == 0);
  CHECK(wrong_decodings(bf16_to_float, 7, 127) == 0);
}

TEST_CASE("half: float32 rounds to the nearest 16-bit value with ties to even") {
  CHECK(wrong_roundings(float_to_f16, 10, 15) == 0);
  CHECK(wrong_roundings(float_to_bf16, 7, 127) == 0);
}

TEST_CASE("half: infinities stay infinite and NaN stays NaN") {
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK(float_to_f16(infinity) == 0x7c00);
  CHECK(float_to_f16(-infinity) == 0xfc00);
  CHECK(float_to_f16(1e38f) == 0x7c00);
  CHECK(float_to_bf16(-infinity) == 0xff80);
  for (const std::uint32_t bits : {0x7f800001u, 0x7fc00000u, 0xff800001u, 0x7fffffffu}) {
    const float nan = std::bit_cast<float>(bits);
    CHECK(std::isnan(f16_to_float(float_to_f16(nan))));
    CHECK(std::isnan(bf16_to_float(float_to_bf16(nan))));
  }
}

// Vector loads and stores of a tier go through its own instructions: dequantize with code 1 stores every scale.
TEST_CASE("half: every tier converts as the scalar code does") {
  constexpr std::int64_t kRows = 64, kGroups = 1024, kGroup = 32;
  Random random(7);
  const std::vector<std::int8_t> codes(kRows * kGroups * kGroup, 1);
  for (const DType from : kFloatTypes) {
    Floats scale(from, kRows * kGroups);
    for (std::int64_t i = 0; i < scale.size(); ++i) {
      // float32 inputs sit on the ties of both 16-bit types, beside them, and anywhere.
      const std::uint32_t step = i % 4 == 0 ? 0x1000u : i % 4 == 1 ? 0x8000u : i % 4 == 2 ? 0x1001u : 1u;
      const float any = std::bit_cast<float>(random.word() / step * step);
      const auto half = static_cast<std::uint16_t>(i);
      scale.set(i, from == DType::f16 ? f16_to_float(half) : from == DType::bf16 ? bf16_to_float(half) : any);
    }
    for (const DType to : kFloatTypes) {
      std::vector<Floats> results;
      for (const cpu::KernelTable* table : cpu::available_tables()) {
        Floats out(to, kRows * kGroups * kGroup);
        const cpu::RowsOut output{out.data(), to, kGroups * kGroup};
        table->dequantize({codes.data(), scale.data(), from, nullptr, kGroups * kGroup, kGroup, kGroups, output}, 0,
                          kRows);
        results.push_back(std::move(out));
        INFO(table->name << " from " << name_of(from) << " to " << name_of(to));
        CHECK(first_difference(results.front(), results.back()) == -1);
      }
    }
  }
}

}  // namespace qtale::test

// pack and unpack against an oracle that writes one bit at a time.
#include <cstring>

#include "catch.h"
#include "support.h"

namespace qtale::test {
namespace {

// Bit i of the stream of a row is bit i % 32 of its word i / 32.
std::vector<std::int32_t> naive_pack(const std::vector<std::int8_t>& codes, std::int64_t rows, std::int64_t cols,
                                     int bits) {
  const std::int64_t words = (cols * bits + 31) / 32;
  std::vector<std::int32_t> out(static_cast<std::size_t>(rows * words), 0);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t i = 0; i < cols * bits; ++i) {
      const int value = codes[r * cols + i / bits] + (1 << (bits - 1));
      std::uint32_t word;
      std::memcpy(&word, &out[r * words + i / 32], sizeof word);
      word |= static_cast<std::uint32_t>((value >> (i % bits)) & 1) << (i % 32);
      std::memcpy(&out[r * words + i / 32], &word, sizeof word);
    }
  }
  return out;
}

std::vector<std::int8_t> random_codes(Random& random, std::int64_t count, int bits) {
  std::vector<std::int8_t> out(static_cast<std::size_t>(count));
  const int half = 1 << (bits - 1);
  for (auto& code : out) code = static_cast<std::int8_t>(random.integer(-half, half - 1));
  return out;
}

void check_round_trip(std::int64_t rows, std::int64_t cols, int bits) {
  Random random(static_cast<std::uint64_t>(rows * 1000 + cols * 10 + bits));
  INFO(rows << " x " << cols << " at " << bits << " bits");
  auto codes = random_codes(random, rows * cols, bits);
  const auto expected = naive_pack(codes, rows, cols, bits);
  std::vector<std::int32_t> packed(expected.size(), -1);
  const auto packed_view = TensorView::matrix(packed.data(), DType::s32, rows, (cols * bits + 31) / 32);
  pack(view(codes, rows, cols), bits, packed_view);
  CHECK(packed == expected);
  std::vector<std::int8_t> back(codes.size(), 99);
  unpack(packed_view, bits, view(back, rows, cols));
  CHECK(back == codes);
}

}  // namespace

TEST_CASE("pack: equals a bit by bit oracle and unpack inverts it") {
  for (const int bits : kBits)
    for (const std::int64_t rows : {0, 1, 3})
      for (const std::int64_t cols : {0, 1, 7, 10, 11, 31, 32, 33, 63, 100, 576}) check_round_trip(rows, cols, bits);
}

TEST_CASE("pack: rows split over threads", "[threads]") {
  const ThreadScope threads(3);
  for (const int bits : kBits) check_round_trip(700, 333, bits);
}

TEST_CASE("pack: the documented example of little-endian words") {
  std::vector<std::int8_t> codes{-8, -7, -6, -5, -4, -3, -2, 7};  // stored as 0 1 2 3 4 5 6 15
  std::vector<std::int32_t> packed(1);
  pack(view(codes, 1, 8), 4, TensorView::matrix(packed.data(), DType::s32, 1, 1));
  CHECK(static_cast<std::uint32_t>(packed[0]) == 0xf6543210u);
}

TEST_CASE("unpack: padding bits of a hostile file do not reach the codes") {
  for (const int bits : kBits) {
    std::vector<std::int32_t> packed(2, -1);
    const std::int64_t cols = 32 / bits + 1;
    std::vector<std::int8_t> codes(static_cast<std::size_t>(cols));
    unpack(TensorView::matrix(packed.data(), DType::s32, 1, 2), bits, view(codes, 1, cols));
    CHECK(codes == std::vector<std::int8_t>(codes.size(), static_cast<std::int8_t>((1 << (bits - 1)) - 1)));
  }
}

}  // namespace qtale::test

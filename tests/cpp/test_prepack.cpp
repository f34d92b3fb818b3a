// The kernel layout: round trips for every panel height and codec, and headers that come from somewhere else.
#include <cstring>

#include "catch.h"
#include "support.h"

namespace qtale::test {
namespace {

struct Grouping {
  std::int64_t k, groups;
};
constexpr Grouping kGroupings[] = {{1, 1},  {7, 1},   {33, 1},  {100, 1}, {576, 1}, {32, 1},  {576, 18},
                                   {96, 1}, {288, 3}, {576, 9}, {384, 3}, {256, 1}, {768, 3}, {0, 1}};
constexpr std::int64_t kCols[] = {0, 1, 15, 16, 17, 63, 64, 65, 130};

template <class Fn>
void for_all(Fn&& fn) {
  Random random(41);
  for (const int bits : kBits)
    for (const Grouping& g : kGroupings)
      for (const bool symmetric : {true, false})
        for (const DType dtype : kFloatTypes)
          for (const std::int64_t n : kCols) fn(random_weight(random, {n, g.k, g.groups, bits, symmetric, dtype}));
}

// Offsets of the fields of the header, as prepack.cpp lays them out.
constexpr std::size_t magic = 0, panel_rows = 8, num_bits = 12, symmetric = 16, scale_dtype = 20, n = 24, k = 32;
constexpr std::size_t groups = 40;

template <class T>
std::vector<std::uint8_t> with_field(std::vector<std::uint8_t> buffer, std::size_t offset, T value) {
  std::memcpy(buffer.data() + offset, &value, sizeof value);
  return buffer;
}

std::string refusal(std::vector<std::uint8_t> buffer) {
  return input_error_of([&] { prepacked_info(view(buffer)); });
}

}  // namespace

TEST_CASE("layout: panels of 16 and of 64 rows give back what they took") {
  for_all([](const Weight& w) {
    for (const int height : {16, 64}) {
      const Panels panels = make_panels(w, height);
      Weight back{w.shape, std::vector<std::int8_t>(w.codes.size(), 99), Floats(w.shape.scale_dtype, w.scale.size()),
                  std::vector<std::int8_t>(w.zero.size(), 99)};
      cpu::read_panels(panels.layout, panels.bytes.data(), 0, panels.layout.panels, back.codes.data(),
                       back.scale.data(), back.zero.data());
      INFO(height << " rows: " << w.shape.text());
      CHECK(back.codes == w.codes);
      CHECK(back.zero == w.zero);
      CHECK(first_difference(back.scale, w.scale) == -1);
    }
  });
}

TEST_CASE("layout: code_at finds every code") {
  Random random(42);
  for (const int bits : kBits)
    for (const int height : {16, 64})
      for (const Grouping& g : {Grouping{100, 1}, Grouping{192, 2}, Grouping{288, 3}, Grouping{256, 2}}) {
        const Weight w = random_weight(random, {70, g.k, g.groups, bits, true, DType::f16});
        const Panels p = make_panels(w, height);
        std::int64_t wrong = 0;
        for (std::int64_t row = 0; row < 70; ++row)
          for (std::int64_t i = 0; i < g.k; ++i) {
            const std::uint8_t* panel = p.bytes.data() + row / height * p.layout.panel_bytes;
            const std::uint8_t* block = panel + p.layout.block_offset(i / p.layout.block_k);
            wrong += cpu::code_at(p.layout, block, row % height, i % p.layout.block_k) != w.level(row, i);
          }
        INFO(bits << " bits, panels of " << height << ", " << g.k << " inputs in " << g.groups << " groups");
        CHECK(wrong == 0);
      }
}

TEST_CASE("prepack: unprepack inverts it on every tier") {
  for (const std::string& isa : cpu_isas()) {
    const IsaScope scope(isa);
    for_all([&](const Weight& w) {
      if (w.shape.n > 17 && w.shape.n < 130) return;
      auto buffer = prepacked(w);
      const PrepackedInfo info = prepacked_info(view(buffer));
      INFO(isa << ": " << w.shape.text());
      CHECK(info.out_features == w.shape.n);
      CHECK(info.in_features == w.shape.k);
      CHECK(info.groups == w.shape.groups);
      CHECK(info.num_bits == w.shape.bits);
      CHECK(info.symmetric == w.shape.symmetric);
      CHECK(info.scale_dtype == w.shape.scale_dtype);
      std::vector<std::int8_t> codes(w.codes.size(), 99), zeros(w.zero.size(), 99);
      const Floats scale(w.shape.scale_dtype, w.scale.size());
      const TensorView zero = view(zeros, w.shape.n, w.shape.groups);
      unprepack(view(buffer), view(codes, w.shape.n, w.shape.k), scale.matrix(w.shape.n, w.shape.groups),
                w.shape.symmetric ? nullptr : &zero);
      CHECK(codes == w.codes);
      CHECK(zeros == w.zero);
      CHECK(first_difference(scale, w.scale) == -1);
    });
  }
}

TEST_CASE("prepacked header: every implausible field is refused in a sentence") {
  Random random(43);
  const auto good = prepacked(random_weight(random, {65, 96, 3, 4, false, DType::f16}));
  REQUIRE(refusal(good) == "");
  std::vector<std::vector<std::uint8_t>> bad;
  for (const char letter : {'q', 'X', '\0'}) bad.push_back(with_field(good, magic, letter));
  for (const int value : {0, -1, 1, 15, 32, 128, 1 << 30}) bad.push_back(with_field(good, panel_rows, value));
  for (const int value : {0, -4, 1, 5, 16, 255}) bad.push_back(with_field(good, num_bits, value));
  for (const int value : {-1, 2, 256}) bad.push_back(with_field(good, symmetric, value));
  for (const int value : {-1, 3, 4, 99}) bad.push_back(with_field(good, scale_dtype, value));
  for (const std::int64_t value : {std::int64_t{-1}, std::int64_t{1} << 31, INT64_MAX, INT64_MIN, std::int64_t{0}}) {
    bad.push_back(with_field(good, n, value));
    bad.push_back(with_field(good, k, value));
    bad.push_back(with_field(good, groups, value));
  }
  for (const std::int64_t value : {2, 4, 6, 96}) bad.push_back(with_field(good, groups, value));
  // Fields that are plausible but do not fit the size of the buffer.
  bad.push_back(with_field(good, num_bits, 8));
  bad.push_back(with_field(good, symmetric, 1));
  bad.push_back(with_field(good, scale_dtype, 0));
  bad.push_back(with_field(good, n, std::int64_t{129}));
  bad.push_back(with_field(good, k, std::int64_t{192}));
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{63}, std::size_t{64}, good.size() - 1})
    bad.emplace_back(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size));
  bad.push_back(good);
  bad.back().push_back(0);
  for (std::size_t i = 0; i < bad.size(); ++i) {
    const std::string message = refusal(bad[i]);
    INFO("case " << i << ": " << message);
    CHECK(message.find("prepacked") == 0);
    CHECK((!message.empty() && message.back() == '.'));
  }
}

TEST_CASE("prepacked header: groups of no inputs are refused") {
  auto buffer = prepacked({{3, 0, 1, 4, true, DType::f32}, {}, Floats(DType::f32, 3), {}});
  buffer.resize(64);
  CHECK(refusal(with_field(buffer, groups, std::int64_t{1} << 62)) != "");
  CHECK(input_error_of([] { prepacked_bytes({3, 0, 5, 4, true, DType::f32}); }) != "");
}

TEST_CASE("prepacked header: random headers are refused or describe exactly their buffer") {
  Random random(44);
  const Weight weight = random_weight(random, {17, 64, 2, 4, true, DType::f32});
  const auto good = prepacked(weight);
  for (int turn = 0; turn < 20000; ++turn) {
    auto buffer = good;
    for (int change = random.integer(1, 3); change > 0; --change)
      buffer[static_cast<std::size_t>(random.integer(0, 47))] = static_cast<std::uint8_t>(random.integer(0, 255));
    if (refusal(buffer) != "") continue;
    const PrepackedInfo info = prepacked_info(view(buffer));
    std::vector<std::int8_t> codes(static_cast<std::size_t>(info.out_features * info.in_features));
    std::vector<std::int8_t> zeros(info.symmetric ? 0 : static_cast<std::size_t>(info.out_features * info.groups));
    const Floats scale(info.scale_dtype, info.out_features * info.groups);
    const TensorView zero = view(zeros, info.out_features, info.groups);
    // AddressSanitizer watches the reads.
    unprepack(view(buffer), view(codes, info.out_features, info.in_features),
              scale.matrix(info.out_features, info.groups), info.symmetric ? nullptr : &zero);
  }
  SUCCEED();
}

}  // namespace qtale::test

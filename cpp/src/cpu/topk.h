// The best products of every row that one thread has met, offered one by one.
#pragma once

#include <bit>
#include <cstdint>

namespace qtale::cpu {

// A product and its entry in one integer: the better the greater, and of equal values the smaller entry is the greater.
using Key = std::uint64_t;

// Views of one thread's memory. A row's keys are cut down to about its k best whenever they fill their capacity, so
// that few products cost more than one comparison with the row's threshold.
struct Candidates {
  std::int64_t k;
  std::int64_t capacity;   // keys per row; more than k, or all entries
  Key* keys;               // [rows, capacity]
  std::int32_t* counts;    // [rows]
  float* thresholds;       // [rows, padded to whole panels]: the least that the last cut kept, NaN before the first one
  std::int64_t first_nan;  // smallest row * 2^31 + entry whose product is NaN
};
inline constexpr std::int64_t kNoNan = INT64_MAX;

// Keeps the k best keys of a row, or a few more, and raises its threshold to the least of them.
void cut_to_best(Candidates& c, std::int64_t row);

namespace {

inline Key key_of(float value, std::int64_t entry) {
  const auto bits = std::bit_cast<std::uint32_t>(value + 0.0f);  // -0 becomes 0: they are equal
  const std::uint32_t ordered = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  return Key{ordered} << 32 | (0xffffffffu - static_cast<std::uint32_t>(entry));
}

inline float value_of(Key key) {
  const auto ordered = static_cast<std::uint32_t>(key >> 32);
  return std::bit_cast<float>(ordered ^ (ordered >> 31 ? 0x80000000u : 0xffffffffu));
}

inline std::int32_t entry_of(Key key) {
  return static_cast<std::int32_t>(0xffffffffu - static_cast<std::uint32_t>(key));
}

// Takes a product that is above its row's threshold, or NaN.
inline void offer(Candidates& c, std::int64_t row, std::int64_t entry, float value) {
  if (value != value) {
    const std::int64_t place = (row << 31) + entry;
    if (place < c.first_nan) c.first_nan = place;
    return;
  }
  std::int32_t& count = c.counts[row];
  c.keys[row * c.capacity + count++] = key_of(value, entry);
  if (count == c.capacity) cut_to_best(c, row);
}

}  // namespace
}  // namespace qtale::cpu

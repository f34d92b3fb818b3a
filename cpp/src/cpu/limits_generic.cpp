// Plain C++: memory is measured everywhere, arithmetic peaks only where a loop of instructions was written.
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace qtale::cpu {
namespace {

struct Line {
  std::uint64_t word[8];
};

inline void merge(Line& seen, const std::byte* p) {
  Line line;
  std::memcpy(&line, p, sizeof line);
  for (int i = 0; i < 8; ++i) seen.word[i] |= line.word[i];
}
inline void keep(const Line& line) { asm volatile("" : : "r"(&line) : "memory"); }

void copy(const std::byte* from, std::byte* to, std::int64_t bytes) {
  std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

}  // namespace
}  // namespace qtale::cpu

#include "cpu/limits_read.inl"

namespace qtale::cpu {

const LimitTable generic_limits = {QTALE_READERS, copy, {nullptr, 0}, {nullptr, 0}, {nullptr, 0}, {nullptr, 0}};

}  // namespace qtale::cpu

// Limits of the machine, taken with the thread pool that the kernels use.
#include "qtale/limits.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <new>

#include "core/text.h"
#include "cpu/isa.h"
#include "cpu/limits.h"
#include "qtale/parallel.h"

namespace qtale {
namespace {

constexpr std::int64_t kPiece = std::int64_t{4} << 20;  // bytes that one thread takes at a time
constexpr std::int64_t kHugePage = std::int64_t{2} << 20;

const cpu::LimitTable& limits() {
#ifdef QTALE_X86
  static const cpu::LimitTable amx_limits = [] {
    cpu::LimitTable same = cpu::avx512_limits;
    same.int8_tile = cpu::amx_tile_limits;
    return same;
  }();
  if (cpu::kernels().int8.run == cpu::avx512_amx_int8_table.run) return amx_limits;
  if (cpu::kernels().panel_rows == cpu::avx512_table.panel_rows) return cpu::avx512_limits;
  if (&cpu::kernels() == &cpu::avx2_table) return cpu::avx2_limits;
#endif
  return cpu::generic_limits;
}

cpu::PeakLoop loop_of(const cpu::LimitTable& table, Peak peak) {
  switch (peak) {
    case Peak::int8_dot: return table.int8_dot;
    case Peak::int8_tile: return table.int8_tile;
    case Peak::u4_int16: return table.u4_int16;
    default: return table.f32_fma;
  }
}

template <class Fn>
double seconds_of(Fn&& fn) {
  const auto start = std::chrono::steady_clock::now();
  fn();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Anonymous memory in huge pages, where the system has them.
class HugeBuffer {
 public:
  explicit HugeBuffer(std::int64_t bytes) : size_(static_cast<std::size_t>(bytes + kHugePage)) {
    base_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(base_, size_, MADV_HUGEPAGE);
#endif
    const auto address = reinterpret_cast<std::uintptr_t>(base_);
    data_ = static_cast<std::byte*>(base_) + (kHugePage - address % kHugePage) % kHugePage;
    std::fill(data_, data_ + bytes, std::byte{1});
  }
  ~HugeBuffer() { munmap(base_, size_); }
  HugeBuffer(const HugeBuffer&) = delete;
  HugeBuffer& operator=(const HugeBuffer&) = delete;

  std::byte* data() const { return data_; }

 private:
  std::size_t size_;
  void* base_;
  std::byte* data_;
};

}  // namespace

std::vector<std::string> reader_names() {
  std::vector<std::string> names;
  for (const cpu::Reader& reader : limits().readers) names.emplace_back(reader.name);
  return names;
}

double read_seconds(const std::vector<Span>& spans, int reader) {
  if (reader < 0 || reader >= cpu::kReaders)
    fail_input("read_seconds: there is no reader {}; use 0 to {}.", reader, cpu::kReaders - 1);
  std::vector<Span> pieces;
  for (const Span& span : spans)
    for (std::int64_t at = 0; at < span.bytes; at += kPiece)
      pieces.push_back({static_cast<const std::byte*>(span.data) + at, std::min(kPiece, span.bytes - at)});
  const auto read = limits().readers[reader].read;
  return seconds_of([&] {
    parallel_for(static_cast<std::int64_t>(pieces.size()), 1, [&](std::int64_t begin, std::int64_t end) {
      for (; begin < end; ++begin) read(static_cast<const std::byte*>(pieces[begin].data), pieces[begin].bytes);
    });
  });
}

double copy_seconds(const void* from, void* to, std::int64_t bytes) {
  const auto bits = reinterpret_cast<std::uintptr_t>(from) | reinterpret_cast<std::uintptr_t>(to);
  if (bytes < 0 || bytes % cpu::kLine != 0 || bits % cpu::kLine != 0)
    fail_input("copy_seconds: {} bytes at these addresses are not whole lines; align all to {} bytes.", bytes,
               cpu::kLine);
  const auto copy = limits().copy;
  const auto* source = static_cast<const std::byte*>(from);
  auto* target = static_cast<std::byte*>(to);
  const std::int64_t pieces = (bytes + kPiece - 1) / kPiece;
  return seconds_of([&] {
    parallel_for(pieces, 1, [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t at = begin * kPiece;
      copy(source + at, target + at, std::min(end * kPiece, bytes) - at);
    });
  });
}

MemoryLimits measure_memory(std::int64_t bytes, int passes) {
  if (bytes < kPiece || passes < 1)
    fail_input("measure_memory: {} bytes in {} passes measure nothing; use at least {} bytes and one pass.", bytes,
               passes, kPiece);
  bytes = bytes / (2 * cpu::kLine) * (2 * cpu::kLine);
  const HugeBuffer buffer(bytes);
  std::vector<double> reads[cpu::kReaders], copies;
  for (int pass = 0; pass < passes; ++pass) {
    for (int reader = 0; reader < cpu::kReaders; ++reader)
      reads[reader].push_back(read_seconds({{buffer.data(), bytes}}, reader));
    copies.push_back(copy_seconds(buffer.data(), buffer.data() + bytes / 2, bytes / 2));
  }
  double medians[cpu::kReaders];
  std::transform(reads, reads + cpu::kReaders, medians, median);
  const auto best = std::min_element(medians, medians + cpu::kReaders) - medians;
  const auto moved = static_cast<double>(bytes);
  return {moved / medians[best], limits().readers[best].name, moved / median(copies)};
}

std::optional<double> measure_peak(Peak peak, double seconds) {
  constexpr std::int64_t kUnit = 4096;  // rounds: some microseconds
  const cpu::PeakLoop loop = loop_of(limits(), peak);
  if (loop.run == nullptr) return std::nullopt;
  const auto run = [&](std::int64_t units) {
    return seconds_of([&] {
      parallel_for(units, 1, [&](std::int64_t begin, std::int64_t end) { loop.run((end - begin) * kUnit); });
    });
  };
  const std::int64_t trial = 16 * num_threads();
  const double unit_seconds = run(trial) / static_cast<double>(trial);
  const std::int64_t units = std::max(trial, static_cast<std::int64_t>(seconds / unit_seconds));
  return static_cast<double>(units * kUnit * loop.ops_per_round) / run(units);
}

}  // namespace qtale

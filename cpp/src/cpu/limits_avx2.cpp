// Limits of x86-64 with AVX2 and FMA. Instructions are spelled out, so that no compiler folds equal ones into one.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace qtale::cpu {
namespace {

struct Line {
  __m256i low, high;
};

inline void merge(Line& seen, const std::byte* p) {
  const auto* half = reinterpret_cast<const __m256i*>(p);
  seen.low = _mm256_or_si256(seen.low, _mm256_loadu_si256(half));
  seen.high = _mm256_or_si256(seen.high, _mm256_loadu_si256(half + 1));
}
inline void keep(const Line& line) { asm volatile("" : : "x"(line.low), "x"(line.high)); }

void copy(const std::byte* from, std::byte* to, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 32) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), half);
  }
  _mm_sfence();
}

constexpr int kChains = 12;  // enough sums in flight to hide any latency, few enough to leave registers for products
constexpr int kOpsPerDot = 64;
constexpr int kOpsPerFma = 16;

__attribute__((noipa)) void dot_loop(std::int64_t rounds) {
  __m256i sum[kChains] = {};
  const __m256i a = _mm256_setzero_si256(), ones = _mm256_set1_epi16(1);
  for (; rounds > 0; --rounds) {
#pragma GCC unroll 12
    for (__m256i& s : sum) {
      __m256i product;
      asm volatile("vpmaddubsw %2, %2, %1\n\tvpmaddwd %3, %1, %1\n\tvpaddd %1, %0, %0"
                   : "+x"(s), "=&x"(product)
                   : "x"(a), "x"(ones));
    }
  }
}

// Products two by two before their sums: the order in which Zen 3 comes nearest to two products a clock.
__attribute__((noipa)) void int16_loop(std::int64_t rounds) {
  __m256i sum[kChains] = {};
  const __m256i a = _mm256_setzero_si256();
  for (; rounds > 0; --rounds) {
#pragma GCC unroll 6
    for (int i = 0; i < kChains; i += 2) {
      __m256i first, second;
      asm volatile("vpmaddubsw %4, %4, %2\n\tvpmaddubsw %4, %4, %3\n\tvpaddw %2, %0, %0\n\tvpaddw %3, %1, %1"
                   : "+x"(sum[i]), "+x"(sum[i + 1]), "=&x"(first), "=&x"(second)
                   : "x"(a));
    }
  }
}

__attribute__((noipa)) void fma_loop(std::int64_t rounds) {
  __m256 sum[kChains] = {};
  const __m256 a = _mm256_setzero_ps();
  for (; rounds > 0; --rounds) {
#pragma GCC unroll 12
    for (__m256& s : sum) asm volatile("vfmadd231ps %1, %1, %0" : "+x"(s) : "x"(a));
  }
}

}  // namespace
}  // namespace qtale::cpu

#include "cpu/limits_read.inl"

namespace qtale::cpu {

const LimitTable avx2_limits = {
    QTALE_READERS,
    copy,
    {dot_loop, kChains * kOpsPerDot},
    {nullptr, 0},
    {int16_loop, kChains * kOpsPerDot},
    {fma_loop, kChains * kOpsPerFma},
};

}  // namespace qtale::cpu

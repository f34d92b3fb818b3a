// Limits of x86-64 with AVX-512 and VNNI. Instructions are spelled out, so that no compiler folds equal ones into one.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace qtale::cpu {
namespace {

struct Line {
  __m512i bytes;
};

inline void merge(Line& seen, const std::byte* p) { seen.bytes = _mm512_or_si512(seen.bytes, _mm512_loadu_si512(p)); }
inline void keep(const Line& line) { asm volatile("" : : "v"(line.bytes)); }

void copy(const std::byte* from, std::byte* to, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
  _mm_sfence();
}

constexpr int kChains = 20;  // enough sums in flight to hide any latency
constexpr int kOpsPerDot = 128;
constexpr int kOpsPerFma = 32;

__attribute__((noipa)) void dot_loop(std::int64_t rounds) {
  __m512i sum[kChains] = {};
  const __m512i a = _mm512_setzero_si512();
  for (; rounds > 0; --rounds) {
#pragma GCC unroll 20
    for (__m512i& s : sum) asm volatile("vpdpbusd %1, %1, %0" : "+v"(s) : "v"(a));
  }
}

__attribute__((noipa)) void fma_loop(std::int64_t rounds) {
  __m512 sum[kChains] = {};
  const __m512 a = _mm512_setzero_ps();
  for (; rounds > 0; --rounds) {
#pragma GCC unroll 20
    for (__m512& s : sum) asm volatile("vfmadd231ps %1, %1, %0" : "+v"(s) : "v"(a));
  }
}

}  // namespace
}  // namespace qtale::cpu

#include "cpu/limits_read.inl"

namespace qtale::cpu {

const LimitTable avx512_limits = {
    QTALE_READERS, copy, {dot_loop, kChains * kOpsPerDot}, {nullptr, 0}, {nullptr, 0}, {fma_loop, kChains * kOpsPerFma},
};

}  // namespace qtale::cpu

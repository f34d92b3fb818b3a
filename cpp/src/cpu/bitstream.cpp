// compressed-tensors' pack-quantized: per row a little-endian bit stream of unsigned codes in 32-bit words.
#include <algorithm>
#include <bit>
#include <cstring>

#include "cpu/backend.h"
#include "qtale/parallel.h"

namespace qtale::cpu {
namespace {

constexpr std::int64_t kGrain = 65536;

std::int64_t words(std::int64_t cols, int bits) { return (cols * bits + 31) / 32; }

// 32 codes are `Bits` whole words at every width, so a row is a run of such blocks and one rest.
template <int Bits>
void pack_block(const std::int8_t* codes, std::uint32_t* out) {
  constexpr std::uint64_t kMask = (1u << Bits) - 1u;
  constexpr int kOffset = 1 << (Bits - 1);
  std::uint64_t window = 0;
  int filled = 0;
  for (int i = 0; i < 32; ++i) {
    window |= (static_cast<std::uint64_t>(codes[i] + kOffset) & kMask) << filled;
    filled += Bits;
    if (filled >= 32) {
      *out++ = static_cast<std::uint32_t>(window);
      window >>= 32;
      filled -= 32;
    }
  }
}

template <int Bits>
void unpack_block(const std::uint32_t* in, std::int8_t* codes) {
  constexpr std::uint64_t kMask = (1u << Bits) - 1u;
  constexpr int kOffset = 1 << (Bits - 1);
  std::uint64_t window = 0;
  int filled = 0;
  for (int i = 0; i < 32; ++i) {
    if (filled < Bits) {
      window |= static_cast<std::uint64_t>(*in++) << filled;
      filled += 32;
    }
    codes[i] = static_cast<std::int8_t>(static_cast<int>(window & kMask) - kOffset);
    window >>= Bits;
    filled -= Bits;
  }
}

template <int Bits>
void pack_row(const std::int8_t* codes, std::int64_t cols, std::uint32_t* out) {
  std::int64_t k = 0;
  for (; k + 32 <= cols; k += 32, out += Bits) pack_block<Bits>(codes + k, out);
  if (k == cols) return;
  std::int8_t rest[32];
  std::fill(rest, rest + 32, static_cast<std::int8_t>(-(1 << (Bits - 1))));  // stored as zero bits
  std::copy(codes + k, codes + cols, rest);
  std::uint32_t last[Bits];
  pack_block<Bits>(rest, last);
  std::copy(last, last + words(cols - k, Bits), out);
}

template <int Bits>
void unpack_row(const std::uint32_t* in, std::int64_t cols, std::int8_t* codes) {
  std::int64_t k = 0;
  for (; k + 32 <= cols; k += 32, in += Bits) unpack_block<Bits>(in, codes + k);
  if (k == cols) return;
  std::uint32_t last[Bits] = {};
  std::copy(in, in + words(cols - k, Bits), last);
  std::int8_t rest[32];
  unpack_block<Bits>(last, rest);
  std::copy(rest, rest + (cols - k), codes + k);
}

template <class Fn>
void with_bits(int num_bits, Fn&& fn) {
  switch (num_bits) {
    case 2: return fn(std::integral_constant<int, 2>{});
    case 3: return fn(std::integral_constant<int, 3>{});
    case 4: return fn(std::integral_constant<int, 4>{});
    default: return fn(std::integral_constant<int, 8>{});
  }
}

std::int64_t rows_per_task(std::int64_t cols) {
  return std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, cols));
}

}  // namespace

static_assert(std::endian::native == std::endian::little, "packed words are little-endian on disk and in memory");

void pack(const std::int8_t* codes, std::int64_t rows, std::int64_t cols, int num_bits, std::int32_t* packed) {
  auto* out = reinterpret_cast<std::uint32_t*>(packed);
  with_bits(num_bits, [&](auto bits) {
    parallel_for(rows, rows_per_task(cols), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r)
        pack_row<bits.value>(codes + r * cols, cols, out + r * words(cols, num_bits));
    });
  });
}

void unpack(const std::int32_t* packed, std::int64_t rows, std::int64_t cols, int num_bits, std::int8_t* codes) {
  const auto* in = reinterpret_cast<const std::uint32_t*>(packed);
  with_bits(num_bits, [&](auto bits) {
    parallel_for(rows, rows_per_task(cols), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r)
        unpack_row<bits.value>(in + r * words(cols, num_bits), cols, codes + r * cols);
    });
  });
}

}  // namespace qtale::cpu

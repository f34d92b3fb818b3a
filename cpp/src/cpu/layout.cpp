#include "cpu/layout.h"

#include <algorithm>
#include <cstring>

namespace qtale::cpu {
namespace {

std::int64_t round_up(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit * unit; }

std::int64_t fitting_block(std::int64_t group_size) {
  for (const std::int64_t size : {kActGroup, kActGroup / 2})
    if (group_size % size == 0) return size;
  return kPadK;
}

constexpr std::uint32_t kEach = 0x01010101u;  // times a byte: that byte four times

std::uint32_t load_word(const std::uint8_t* p) {
  std::uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}
void store_word(std::uint8_t* p, std::uint32_t word) { std::memcpy(p, &word, sizeof word); }

// Where a quad (the codes of one row at k = 4q to 4q + 3, in the four bytes of a word) lies in a block.
template <int Bits, int Rows>
struct Format {
  static constexpr std::uint32_t kOffset = Bits == 8 && Rows == 16 ? 0 : 1u << (Bits - 1);
  static constexpr std::int64_t kLine = Rows * 4;

  // Calls fn(byte offset of the row's word, bit, bit count, first bit of the value) for each piece in whole words.
  template <class Fn>
  static void for_each_piece(std::int64_t row, std::int64_t q, Fn&& fn) {
    const std::int64_t lane = row * 4;
    const int part = static_cast<int>(q % 8);
    if constexpr (Bits == 8) {
      fn(q * kLine + lane, 0, 8, 0);
    } else if constexpr (Bits == 4) {
      fn(q / 2 * kLine + lane, part % 2 * 4, 4, 0);
    } else if constexpr (Bits == 2) {
      fn(q / 4 * kLine + lane, part % 4 * 2, 2, 0);
    } else {
      const std::int64_t at = q / 8 * 3 * kLine + lane;
      if (part < 6) return fn(at + part / 2 * kLine, part % 2 * 3, 3, 0);
      fn(at + (part - 6) * kLine, 6, 2, 0);
      fn(at + 2 * kLine, part, 1, 2);
    }
  }

  static void put(std::uint8_t* block, std::int64_t row, std::int64_t q, std::uint32_t codes) {
    const std::uint32_t value = (codes ^ (kOffset * kEach)) & (((1u << Bits) - 1u) * kEach);
    for_each_piece(row, q, [&](std::int64_t byte, int bit, int count, int first) {
      const std::uint32_t piece = (value >> first) & (((1u << count) - 1u) * kEach);
      store_word(block + byte, load_word(block + byte) | (piece << bit));
    });
  }

  static std::uint32_t get(const std::uint8_t* block, std::int64_t row, std::int64_t q) {
    std::uint32_t value = 0;
    for_each_piece(row, q, [&](std::int64_t byte, int bit, int count, int first) {
      value |= ((load_word(block + byte) >> bit) & (((1u << count) - 1u) * kEach)) << first;
    });
    if constexpr (Bits == 8) return value ^ (kOffset * kEach);
    return ((value | (0x80u * kEach)) - kOffset * kEach) ^ (0x80u * kEach);  // four subtractions without borrow
  }
};

template <class Fn>
auto with_format(const Layout& l, Fn&& fn) {
  const bool wide = l.panel_rows == 64;
  switch (l.num_bits) {
    case 2: return wide ? fn(Format<2, 64>{}) : fn(Format<2, 16>{});
    case 3: return wide ? fn(Format<3, 64>{}) : fn(Format<3, 16>{});
    case 4: return wide ? fn(Format<4, 64>{}) : fn(Format<4, 16>{});
    default: return wide ? fn(Format<8, 64>{}) : fn(Format<8, 16>{});
  }
}

constexpr std::int64_t kQuadsPerLine = 8;  // at most; unrolled, so that words are written once

// One row of a block: `count` codes, then zeros up to `padded`, a multiple of 32.
template <class F>
void put_row(F, std::uint8_t* block, std::int64_t row, const std::int8_t* codes, std::int64_t count,
             std::int64_t padded) {
  std::int8_t rest[kPadK];
  for (std::int64_t k = 0; k < padded; k += 4 * kQuadsPerLine) {
    const std::int8_t* from = codes + k;
    if (count - k < kPadK) {
      std::fill(rest, rest + kPadK, std::int8_t{0});
      if (count > k) std::copy(codes + k, codes + count, rest);
      from = rest;
    }
    std::uint32_t quads[kQuadsPerLine];
    std::memcpy(quads, from, sizeof quads);
#pragma GCC unroll 8
    for (std::int64_t q = 0; q < kQuadsPerLine; ++q) F::put(block, row, k / 4 + q, quads[q]);
  }
}

template <class F>
void get_row(F, const std::uint8_t* block, std::int64_t row, std::int8_t* codes, std::int64_t count) {
  std::uint32_t quads[kQuadsPerLine];
  for (std::int64_t k = 0; k < count; k += 4 * kQuadsPerLine) {
#pragma GCC unroll 8
    for (std::int64_t q = 0; q < kQuadsPerLine; ++q) quads[q] = F::get(block, row, k / 4 + q);
    std::memcpy(codes + k, quads, static_cast<std::size_t>(std::min(count - k, kPadK)));
  }
}

// A matrix without inputs has no blocks, but one scale per row all the same.
std::int64_t param_blocks(const Layout& l) { return std::max<std::int64_t>(l.blocks, 1); }

}  // namespace

int code_at(const Layout& l, const std::uint8_t* block, std::int64_t row, std::int64_t k) {
  return with_format(l, [&](auto format) {
    return static_cast<int>(static_cast<std::int8_t>(decltype(format)::get(block, row, k / 4) >> (k % 4 * 8)));
  });
}

void read_row(const Layout& l, const std::uint8_t* block, std::int64_t row, std::int64_t count, std::int8_t* codes) {
  with_format(l, [&](auto format) { get_row(format, block, row, codes, count); });
}

Layout make_layout(int panel_rows, int num_bits, std::int64_t n, std::int64_t k, std::int64_t groups, bool symmetric,
                   DType scale_dtype) {
  Layout l;
  l.panel_rows = panel_rows;
  l.num_bits = num_bits;
  l.symmetric = symmetric;
  l.per_channel = groups == 1;
  l.scale_dtype = scale_dtype;
  l.n = n;
  l.k = k;
  l.groups = groups;
  l.group_size = k / groups;
  l.k_padded = round_up(k, kPadK);
  l.block_k = l.per_channel ? kActGroup : fitting_block(l.group_size);
  l.blocks = (l.k_padded + l.block_k - 1) / l.block_k;
  l.act_groups = (l.k_padded + kActGroup - 1) / kActGroup;
  l.panels = (n + panel_rows - 1) / panel_rows;
  l.code_bytes = panel_rows * l.block_k * num_bits / 8;
  l.scale_bytes = panel_rows * size_of(scale_dtype);
  l.param_bytes = l.scale_bytes + (symmetric ? 0 : panel_rows);
  const std::int64_t all_codes = panel_rows * l.k_padded * num_bits / 8;
  l.panel_bytes = all_codes + (l.per_channel ? 1 : l.blocks) * l.param_bytes;
  return l;
}

void fill_panels(const Layout& l, const std::int8_t* codes, const void* scale, const std::int8_t* zero_point,
                 std::int64_t begin, std::int64_t end, std::uint8_t* out) {
  const std::int64_t item = size_of(l.scale_dtype);
  const auto* scales = static_cast<const std::uint8_t*>(scale);
  for (std::int64_t panel = begin; panel < end; ++panel) {
    std::uint8_t* base = out + panel * l.panel_bytes;
    std::memset(base, 0, static_cast<std::size_t>(l.panel_bytes));
    const std::int64_t first = panel * l.panel_rows;
    const std::int64_t rows = std::min<std::int64_t>(l.panel_rows, l.n - first);
    for (std::int64_t b = 0; b < param_blocks(l); ++b) {
      std::uint8_t* block = base + l.block_offset(b);
      std::uint8_t* params = base + l.param_offset(b);
      const std::int64_t k0 = b * l.block_k;
      const std::int64_t group = l.per_channel ? 0 : k0 / l.group_size;
      const std::int64_t count = std::min(l.block_size(b), l.k - k0);
      with_format(l, [&](auto format) {
        for (std::int64_t r = 0; r < rows; ++r)
          put_row(format, block, r, codes + (first + r) * l.k + k0, count, l.block_size(b));
      });
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t at = (first + r) * l.groups + group;
        std::memcpy(params + r * item, scales + at * item, static_cast<std::size_t>(item));
        if (!l.symmetric) params[l.scale_bytes + r] = static_cast<std::uint8_t>(zero_point[at]);
      }
    }
  }
}

void read_panels(const Layout& l, const std::uint8_t* data, std::int64_t begin, std::int64_t end, std::int8_t* codes,
                 void* scale, std::int8_t* zero_point) {
  const std::int64_t item = size_of(l.scale_dtype);
  auto* scales = static_cast<std::uint8_t*>(scale);
  for (std::int64_t panel = begin; panel < end; ++panel) {
    const std::uint8_t* base = data + panel * l.panel_bytes;
    const std::int64_t first = panel * l.panel_rows;
    const std::int64_t rows = std::min<std::int64_t>(l.panel_rows, l.n - first);
    for (std::int64_t b = 0; b < param_blocks(l); ++b) {
      const std::uint8_t* params = base + l.param_offset(b);
      const std::int64_t k0 = b * l.block_k;
      const std::int64_t group = l.per_channel ? 0 : k0 / l.group_size;
      const std::int64_t count = std::min(l.block_size(b), l.k - k0);
      with_format(l, [&](auto format) {
        for (std::int64_t r = 0; r < rows; ++r)
          get_row(format, base + l.block_offset(b), r, codes + (first + r) * l.k + k0, count);
      });
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t at = (first + r) * l.groups + group;
        std::memcpy(scales + at * item, params + r * item, static_cast<std::size_t>(item));
        if (!l.symmetric) zero_point[at] = static_cast<std::int8_t>(params[l.scale_bytes + r]);
      }
    }
  }
}

}  // namespace qtale::cpu

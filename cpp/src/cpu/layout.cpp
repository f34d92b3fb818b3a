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

// Calls fn(byte offset, bit, bit count, first bit of the value) for each piece of the code at (row, k) of a block.
template <class Fn>
void for_each_piece(const Layout& l, std::int64_t row, std::int64_t k, Fn&& fn) {
  const std::int64_t step_bytes = l.panel_rows * 4;
  const std::int64_t lane = row * 4 + k % 4;
  switch (l.num_bits) {
    case 8: return fn(k / 4 * step_bytes + lane, 0, 8, 0);
    case 4: return fn(k / 8 * step_bytes + lane, static_cast<int>(k / 4 % 2 * 4), 4, 0);
    case 2: return fn(k / 16 * step_bytes + lane, static_cast<int>(k / 4 % 4 * 2), 2, 0);
    default: break;
  }
  if (l.panel_rows == 64) {
    const int field = static_cast<int>(k / 4 % 4);
    const std::int64_t step = k / 16 * (step_bytes + step_bytes / 2);
    fn(step + lane, field * 2, 2, 0);
    return fn(step + step_bytes + field * step_bytes / 8 + lane / 8, static_cast<int>(lane % 8), 1, 2);
  }
  const std::int64_t at = k / 32 * 3 * step_bytes + lane;
  const std::int64_t quad = k / 4 % 8;
  if (quad < 6) return fn(at + quad / 2 * step_bytes, static_cast<int>(quad % 2 * 3), 3, 0);
  fn(at + (quad - 6) * step_bytes, 6, 2, 0);
  fn(at + 2 * step_bytes, static_cast<int>(quad), 1, 2);
}

// A matrix without inputs has no blocks, but one scale per row all the same.
std::int64_t param_blocks(const Layout& l) { return std::max<std::int64_t>(l.blocks, 1); }

int code_offset(const Layout& l) { return l.num_bits == 8 && l.panel_rows != 64 ? 0 : 1 << (l.num_bits - 1); }

void put_code(const Layout& l, std::uint8_t* block, std::int64_t row, std::int64_t k, int code) {
  const unsigned value = static_cast<unsigned>(code + code_offset(l));
  for_each_piece(l, row, k, [&](std::int64_t byte, int bit, int count, int first) {
    const unsigned mask = (1u << count) - 1u;
    block[byte] = static_cast<std::uint8_t>(block[byte] | (((value >> first) & mask) << bit));
  });
}

}  // namespace

int code_at(const Layout& l, const std::uint8_t* block, std::int64_t row, std::int64_t k) {
  unsigned value = 0;
  for_each_piece(l, row, k, [&](std::int64_t byte, int bit, int count, int first) {
    value |= ((static_cast<unsigned>(block[byte]) >> bit) & ((1u << count) - 1u)) << first;
  });
  if (code_offset(l) == 0) return static_cast<std::int8_t>(value);
  return static_cast<int>(value) - code_offset(l);
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
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int8_t* row = codes + (first + r) * l.k;
        for (std::int64_t i = 0; i < l.block_size(b); ++i)
          put_code(l, block, r, i, k0 + i < l.k ? row[k0 + i] : 0);
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
      for (std::int64_t r = 0; r < rows; ++r) {
        std::int8_t* row = codes + (first + r) * l.k;
        const std::int64_t count = std::min(l.block_size(b), l.k - k0);
        for (std::int64_t i = 0; i < count; ++i)
          row[k0 + i] = static_cast<std::int8_t>(code_at(l, base + l.block_offset(b), r, i));
        const std::int64_t at = (first + r) * l.groups + group;
        std::memcpy(scales + at * item, params + r * item, static_cast<std::size_t>(item));
        if (!l.symmetric) zero_point[at] = static_cast<std::int8_t>(params[l.scale_bytes + r]);
      }
    }
  }
}

}  // namespace qtale::cpu

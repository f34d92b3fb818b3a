// The layout that kernels read: panels of `panel_rows` output rows, inputs in blocks, everything in reading order.
//
// A panel is a sequence of blocks of `block_k` inputs (the last one of a per-channel matrix may be shorter; all are
// multiples of 32). A block holds codes and, for grouped matrices, panel_rows scales and (asymmetric) zero points.
// Per-channel matrices have their scales and zero points once, behind the last block.
// Codes, with R = panel_rows and c = 2^(b-1); a 32-bit lane always belongs to one row:
//   8 bits: [k/4][R][4] bytes; code + 128 in 64-row panels, the signed code in 16-row panels.
//   4 bits: [k/8][R][4] bytes; low nibble k = 8s + j, high nibble k = 8s + 4 + j, value code + 8.
//   2 bits: [k/16][R][4] bytes; field f (bits 2f, 2f+1) is k = 16s + 4f + j, value code + 2.
//   3 bits: per 32 k three lines [R][4], value code + 4. Line t holds k = 32s + 8t + j in its bits 0-2 and 4 later in
//           bits 3-5. Bits 6-7 of lines 0 and 1 are the low bits of k = 32s + 24 + j and 32s + 28 + j; their high bits
//           are bits 6 and 7 of line 2. Six of eight registers then unpack with a shift and a mask.
#pragma once

#include <cstddef>
#include <cstdint>

#include "qtale/dtype.h"

namespace qtale::cpu {

inline constexpr std::int64_t kActGroup = 128;  // inputs that share one int8 activation scale
inline constexpr std::int64_t kPadK = 32;

struct Layout {
  int panel_rows = 0;
  int num_bits = 0;
  bool symmetric = true;
  bool per_channel = false;
  DType scale_dtype = DType::f32;
  std::int64_t n = 0;           // out_features
  std::int64_t k = 0;           // in_features
  std::int64_t group_size = 0;  // inputs per scale; k if per channel
  std::int64_t groups = 1;      // scales per row
  std::int64_t k_padded = 0;    // multiple of 32
  std::int64_t block_k = 0;     // 32, 64 or 128
  std::int64_t blocks = 0;      // per panel
  std::int64_t act_groups = 0;  // int8 activation scales per row
  std::int64_t panels = 0;
  std::int64_t code_bytes = 0;   // codes of one full block
  std::int64_t param_bytes = 0;  // scales and zero points of one block (grouped) or of the panel (per channel)
  std::int64_t scale_bytes = 0;  // the scales among them
  std::int64_t panel_bytes = 0;

  // Start of block b inside its panel.
  std::int64_t block_offset(std::int64_t b) const { return b * (code_bytes + (per_channel ? 0 : param_bytes)); }
  // Start of the scales that block b uses, inside its panel; zero points follow at + scale_bytes.
  std::int64_t param_offset(std::int64_t b) const {
    return per_channel ? panel_bytes - param_bytes : block_offset(b) + code_bytes;
  }
  // Inputs of block b, padding included.
  std::int64_t block_size(std::int64_t b) const {
    const std::int64_t rest = k_padded - b * block_k;
    return rest < block_k ? rest : block_k;
  }
};

Layout make_layout(int panel_rows, int num_bits, std::int64_t n, std::int64_t k, std::int64_t groups, bool symmetric,
                   DType scale_dtype);

// The code of panel row `row` and input `k` of a block that starts at `block`.
int code_at(const Layout& layout, const std::uint8_t* block, std::int64_t row, std::int64_t k);
// The codes of its first `count` inputs.
void read_row(const Layout& layout, const std::uint8_t* block, std::int64_t row, std::int64_t count,
              std::int8_t* codes);

// Moves codes and parameters of panels [begin, end) into and out of the layout; scales keep their bits.
void fill_panels(const Layout& layout, const std::int8_t* codes, const void* scale, const std::int8_t* zero_point,
                 std::int64_t begin, std::int64_t end, std::uint8_t* out);
void read_panels(const Layout& layout, const std::uint8_t* data, std::int64_t begin, std::int64_t end,
                 std::int8_t* codes, void* scale, std::int8_t* zero_point);

}  // namespace qtale::cpu

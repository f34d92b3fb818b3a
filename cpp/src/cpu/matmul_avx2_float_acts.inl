// Activations as the float AVX2 kernels read them. A 32-bit lane of a panel holds several codes of one row; masking it
// above field f and converting gives v_f = sum over g <= f of code_g * 2^start_g, up to float32 rounding. The lower
// fields that every v_f drags along are taken out of the activations instead:
// sum_f code_f * x_f = sum_f v_f * c_f with c_f = x_f / 2^start_f - x_(f+1) / 2^start_(f+1).
#pragma once

#include "cpu/matmul_avx2_acts.inl"

namespace qtale::cpu {
namespace {

struct Field {
  int start;  // lowest bit in its lane
  int input;  // among the 32 of a step
  int shift;  // it counts 2^shift times: the high bits of 3-bit codes are fields of their own
};

// Field `index` of line `line` (64 bytes, two registers) of 32 inputs in the layout.
template <int Bits>
constexpr Field field_of(int line, int index) {
  if (Bits == 8) return {8 * index, 4 * line + index, 0};
  if (Bits == 4) return {4 * index, 8 * line + index / 2 + index % 2 * 4, 0};
  if (Bits == 2) return {2 * index, 16 * line + index / 4 + index % 4 * 4, 0};
  const int fields = line < 2 ? 3 : 4, byte = index / fields, part = index % fields;
  if (part < 2) return {8 * byte + 3 * part, 8 * line + byte + part * 4, 0};
  if (line < 2) return {8 * byte + 6, 24 + 4 * line + byte, 0};
  return {8 * byte + 4 + part, 24 + byte + (part - 2) * 4, 2};
}
template <int Bits>
constexpr int fields_of(int line) {
  return Bits != 3 ? 32 / Bits : line < 2 ? 12 : 16;
}
template <int Bits>
constexpr int kLines = Bits == 3 ? 3 : Bits;  // of 32 inputs
template <int Bits>
constexpr int kCoefficients = Bits == 3 ? 40 : 32;  // of 32 inputs

// c_f = own * x[input] - next * x[next_input].
template <int Bits>
struct CoefficientTable {
  int input[kCoefficients<Bits>] = {}, next_input[kCoefficients<Bits>] = {};
  float own[kCoefficients<Bits>] = {}, next[kCoefficients<Bits>] = {};

  static constexpr float weight(Field f) {
    return (f.shift ? 4.0f : 1.0f) / static_cast<float>(std::uint32_t{1} << f.start);
  }
  constexpr CoefficientTable() {
    int at = 0;
    for (int line = 0; line < kLines<Bits>; ++line) {
      for (int i = 0; i < fields_of<Bits>(line); ++i, ++at) {
        const bool last = i + 1 == fields_of<Bits>(line);
        const Field f = field_of<Bits>(line, i), g = field_of<Bits>(line, last ? i : i + 1);
        input[at] = f.input;
        next_input[at] = g.input;
        // The kernel halves the whole lane, so that it converts as a positive number.
        own[at] = last ? 2.0f * weight(f) : weight(f);
        next[at] = last ? 0.0f : weight(g);
      }
    }
  }
};

struct FloatActs {
  std::int64_t blocks;
  std::int64_t stride;  // bytes from row to row of coefficients
  std::byte* values;    // the coefficients
  float* sums;          // [rows, blocks]: sums of the activations
  std::size_t bytes;

  FloatActs(const Layout& l, std::int64_t rows, std::byte* workspace)
      : blocks(l.blocks), stride(row_stride(l.k_padded / kPadK * (l.num_bits == 3 ? 40 : 32) * 4)) {
    values = workspace;
    sums = reinterpret_cast<float*>(workspace + rows * stride);
    bytes = static_cast<std::size_t>(rows * stride) + aligned(static_cast<std::size_t>(rows * blocks) * sizeof(float));
  }
};

inline std::size_t float_acts_bytes(const Layout& l, std::int64_t rows) { return FloatActs(l, rows, nullptr).bytes; }

template <int Bits, class E>
void prepare_float_row(const Layout& l, const FloatActs& out, std::int64_t m, const typename E::T* row) {
  static constexpr CoefficientTable<Bits> kTable;
  alignas(32) float x[kPadK];
  auto* to = reinterpret_cast<float*>(out.values + m * out.stride);
  for (std::int64_t b = 0; b < l.blocks; ++b) {
    VecF sum = set1(0.0f);
    for (std::int64_t k = b * l.block_k; k < b * l.block_k + l.block_size(b); k += kPadK) {
      for (std::int64_t i = 0; i < kPadK; i += kWidth) {
        const std::int64_t rest = l.k - k - i;
        const VecF v = rest >= kWidth ? E::load(row + k + i) : rest > 0 ? load_part<E>(row + k + i, rest) : set1(0.0f);
        store_f32(x + i, v);
        sum = add(sum, v);
      }
      for (int f = 0; f < kCoefficients<Bits>; ++f)
        to[f] = kTable.own[f] * x[kTable.input[f]] - kTable.next[f] * x[kTable.next_input[f]];
      to += kCoefficients<Bits>;
    }
    out.sums[m * l.blocks + b] = reduce_add(sum);
  }
}

void prepare_float_acts(const MatmulArgs& a, std::int64_t begin, std::int64_t end) {
  const Layout& l = *a.layout;
  const FloatActs out(l, a.rows, a.workspace);
  with_type(a.x.dtype, [&](auto element) {
    using E = decltype(element);
    const auto prepare = l.num_bits == 2   ? prepare_float_row<2, E>
                         : l.num_bits == 3 ? prepare_float_row<3, E>
                         : l.num_bits == 4 ? prepare_float_row<4, E>
                                           : prepare_float_row<8, E>;
    for (std::int64_t m = begin; m < end; ++m)
      prepare(l, out, m, static_cast<const typename E::T*>(a.x.data) + m * a.x.stride);
  });
}

}  // namespace
}  // namespace qtale::cpu

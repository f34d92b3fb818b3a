// Where finished sums go: to the candidates of project_topk, or to the rows of matmul.
#pragma once

#include "cpu/project_pack.inl"
#include "cpu/topk.h"

namespace qtale::cpu::projection {
namespace {

struct Offer {
  Candidates& c;

  // Entries come in any order: one that equals the threshold may be the smaller entry, the better of the two.
  void one(std::int64_t row, std::int64_t entry, float sum) const {
    if (!(sum < c.thresholds[row])) offer(c, row, entry, sum);
  }

  // Sums [count][Vecs * kWidth] of the rows of one panel, whose entries come in ascending order.
  template <int Vecs>
  void panel(const float* sums, std::int64_t entry, std::int64_t count, std::int64_t first_row,
             std::int64_t rows) const {
    const unsigned all = rows >= 32 ? ~0u : (1u << rows) - 1u;
    for (std::int64_t e = 0; e < count; ++e, sums += Vecs * kWidth) {
      for (int p = 0; p < Vecs; ++p) {
        const float* thresholds = c.thresholds + first_row + p * kWidth;
        unsigned above = not_le(load_f32(sums + p * kWidth), load_f32(thresholds)) & (all >> (p * kWidth));
        for (; above != 0; above &= above - 1) {
          const int lane = p * kWidth + __builtin_ctz(above);
          offer(c, first_row + lane, entry + e, sums[lane]);
        }
      }
    }
  }
};

struct Store {
  const ProjectOut& out;

  void one(std::int64_t row, std::int64_t entry, float sum) const {
    out.y[row * out.stride + entry] = out.bias == nullptr ? sum : sum + out.bias[entry];
  }

  template <int Vecs>
  void panel(const float* sums, std::int64_t entry, std::int64_t count, std::int64_t first_row,
             std::int64_t rows) const {
    constexpr std::int64_t kPanel = Vecs * kWidth;
    const std::int64_t whole_rows = rows / 4 * 4, whole = count / 4 * 4;
    for (std::int64_t r = 0; r < whole_rows; r += 4) {
      float* y = out.y + (first_row + r) * out.stride + entry;
      for (std::int64_t e = 0; e < whole; e += 4) {
        const Quads quads = load_transposed(sums + e * kPanel + r, kPanel);
        const Quad bias = out.bias == nullptr ? Quad{} : load_quad(out.bias + entry + e);
        unroll<4>([&](auto i) QTALE_INLINE_LAMBDA {
          store_quad(y + i * out.stride + e, out.bias == nullptr ? quads.row[i] : quads.row[i] + bias);
        });
      }
    }
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t e = r < whole_rows ? whole : 0; e < count; ++e)
        one(first_row + r, entry + e, sums[e * kPanel + r]);
  }
};

}  // namespace
}  // namespace qtale::cpu::projection

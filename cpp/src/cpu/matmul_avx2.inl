// qmatmul on AVX2 over 16-row panels: what the int8 and the float form share, from row blocks down to one tile.
// One activation row streams four panels at a time and two or three rows two panels, because a single stream does not
// draw all the memory can give. More rows go through one panel in tiles of up to six.
#pragma once

#include <immintrin.h>

#include "cpu/activations.inl"

namespace qtale::cpu {
namespace {

constexpr int kRows = 16;
constexpr int kTile = 6;          // activation rows: twelve accumulators leave room for weights, a broadcast, a product
constexpr int kPrefetch = 1024;   // bytes ahead in each stream
constexpr int kRowBlock = 132;    // activation rows that share one unpacked panel; their outputs stay in L1
constexpr int kKeptBytes = 8192;  // unpacked codes of one panel that stay in L1

#define QTALE_UNROLL _Pragma("GCC unroll 16")
#define QTALE_INLINE __attribute__((always_inline)) inline

QTALE_INLINE __m256i load_line(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// Scales of panel rows 8 * half to 8 * half + 7.
QTALE_INLINE __m256 load_scales(const std::uint8_t* p, DType dtype, int half) {
  if (dtype == DType::f16) return load_f16(reinterpret_cast<const std::uint16_t*>(p) + 8 * half);
  if (dtype == DType::bf16) return load_bf16(reinterpret_cast<const std::uint16_t*>(p) + 8 * half);
  return load_f32(reinterpret_cast<const float*>(p) + 8 * half);
}

QTALE_INLINE __m256 load_zeros(const std::uint8_t* p, int half) {
  return load_s8(reinterpret_cast<const std::int8_t*>(p) + 8 * half);
}

// One tile: activation rows from `row` on, times blocks [begin, end) of one panel or of several panels `stream` bytes
// apart. Sums are added to out [streams][rows][16]; part, as large, holds those of an unfinished activation group.
template <class Acts>
struct Tile {
  const Layout* layout;
  const Acts* acts;
  std::int64_t row;
  const std::uint8_t* panel;
  std::int64_t stream;
  std::int64_t begin, end;
  std::uint8_t* kept;  // unpacked codes of the blocks, for the other tiles of the same panel
  float* part;
  float* out;
};

template <class Acts>
using TileFn = void (*)(const Tile<Acts>&);

// Lives on the stack of each thread that runs tiles.
struct Frame {
  alignas(64) float out[kRowBlock * kRows];
  alignas(64) float part[kTile * kRows];
  alignas(64) std::uint8_t kept[kKeptBytes];
};

void finish_panel(const MatmulArgs& a, std::int64_t panel, std::int64_t row, std::int64_t rows, float* out) {
  const Layout& l = *a.layout;
  const std::uint8_t* params = a.panels + panel * l.panel_bytes + l.param_offset(0);
  const std::int64_t col = panel * kRows, count = min64(kRows, l.n - col);
  for (std::int64_t m = 0; m < rows; ++m) {
    float* values = out + m * kRows;
    if (l.per_channel)
      for (int half = 0; half < 2; ++half)
        store_f32(values + 8 * half, mul(load_f32(values + 8 * half), load_scales(params, l.scale_dtype, half)));
    store_outputs(a, row + m, col, values, count);
  }
}

// One to three rows through `streams` equal runs of panels at once; every run is read strictly forward.
template <class Mode>
void run_streams(const MatmulArgs& a, const typename Mode::Acts& acts, Frame& frame, int streams, std::int64_t begin,
                 std::int64_t end, std::int64_t row, std::int64_t rows) {
  const Layout& l = *a.layout;
  const std::int64_t length = (end - begin) / streams;
  const auto tile = Mode::direct(l.num_bits, rows, streams);
  for (std::int64_t i = 0; i < length; ++i) {
    std::memset(frame.out, 0, static_cast<std::size_t>(streams * rows * kRows) * sizeof(float));
    tile({&l, &acts, row, a.panels + (begin + i) * l.panel_bytes, length * l.panel_bytes, 0, l.blocks, frame.kept,
          frame.part, frame.out});
    for (std::int64_t s = 0; s < streams; ++s)
      finish_panel(a, begin + i + s * length, row, rows, frame.out + s * rows * kRows);
  }
  if (streams > 1) run_streams<Mode>(a, acts, frame, 1, begin + streams * length, end, row, rows);
}

// All tiles of a row block through one panel, a stretch of inputs at a time so that its codes stay in L1. The first
// tile unpacks them as it goes, the others read what it kept.
template <class Mode>
void run_panel(const MatmulArgs& a, const typename Mode::Acts& acts, Frame& frame, std::int64_t panel,
               std::int64_t row, std::int64_t rows) {
  const Layout& l = *a.layout;
  const std::int64_t stretch = rows > kTile ? Mode::stretch(l.num_bits) / l.block_k : l.blocks;
  std::memset(frame.out, 0, static_cast<std::size_t>(rows * kRows) * sizeof(float));
  for (std::int64_t b = 0; b < l.blocks; b += stretch) {
    for (std::int64_t m = 0; m < rows;) {
      const std::int64_t size = next_tile(rows - m, kTile);
      const auto tile = m > 0          ? Mode::kept(l.num_bits, size)
                        : size == rows ? Mode::direct(l.num_bits, size, 1)
                                       : Mode::keep(l.num_bits, size);
      tile({&l, &acts, row + m, a.panels + panel * l.panel_bytes, 0, b, min64(b + stretch, l.blocks), frame.kept,
            frame.part, frame.out + m * kRows});
      m += size;
    }
  }
  finish_panel(a, panel, row, rows, frame.out);
}

template <class Mode>
void run_tiles(const MatmulArgs& a, std::int64_t panel_begin, std::int64_t panel_end, std::int64_t row_begin,
               std::int64_t row_end) {
  const typename Mode::Acts acts(*a.layout, a.rows, a.workspace);
  Frame frame;
  for (std::int64_t row = row_begin; row < row_end;) {
    const std::int64_t rows = next_tile(row_end - row, kRowBlock);
    if (rows <= 3)
      run_streams<Mode>(a, acts, frame, rows == 1 ? 4 : 2, panel_begin, panel_end, row, rows);
    else
      for (std::int64_t panel = panel_begin; panel < panel_end; ++panel)
        run_panel<Mode>(a, acts, frame, panel, row, rows);
    row += rows;
  }
}

}  // namespace
}  // namespace qtale::cpu

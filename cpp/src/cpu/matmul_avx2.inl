// qmatmul on AVX2 over 16-row panels, from row blocks down to tiles.
// One row streams four panels at a time and two rows two panels, because a single stream does not draw all the memory
// can give. More rows go through one panel in tiles of up to six; just seven of up to 4 bits make one tile.
#pragma once

#include "cpu/matmul_avx2_tile.inl"

namespace qtale::cpu {
namespace {

constexpr int kRowBlock = 132;  // rows of codes that share one unpacked panel; their outputs stay in L1
constexpr int kKeptBytes = 32768;

// Lives on the stack of each thread that runs tiles.
struct Frame {
  alignas(64) float out[kRowBlock * kRows];
  alignas(64) float part[direct_rows(false) * kRows];
  alignas(64) __m256i seventh[2][2];
  alignas(64) std::uint8_t kept[kKeptBytes];
  alignas(64) float kept_scales[kKeptBytes / kPadK];
};

// Adds up the planes of each activation row, least first, and stores it.
void finish_panel(const MatmulArgs& a, const Acts& acts, std::int64_t panel, std::int64_t row, std::int64_t rows,
                  float* out) {
  const Layout& l = *a.layout;
  const std::uint8_t* params = a.panels + panel * l.panel_bytes + l.param_offset(0);
  const std::int64_t col = panel * kRows, count = min64(kRows, l.n - col);
  VecF scales[2];
  if (l.per_channel) load_scales(params, l.scale_dtype, scales);
  for (std::int64_t r = 0; r < rows; r += acts.planes) {
    float* values = out + r * kRows;
    if (acts.planes > 1 || l.per_channel)
      for (int half = 0; half < 2; ++half) {
        VecF sum = load_f32(values + (acts.planes - 1) * kRows + 8 * half);
        for (std::int64_t p = acts.planes - 2; p >= 0; --p) sum = add(sum, load_f32(values + p * kRows + 8 * half));
        if (l.per_channel) sum = mul(sum, scales[half]);
        store_f32(values + 8 * half, sum);
      }
    store_outputs(a, (row + r) / acts.planes, col, values, count);
  }
}

// One to three rows through `streams` equal runs of panels at once; every run is read strictly forward.
void run_streams(const MatmulArgs& a, const Acts& acts, Frame& frame, int streams, std::int64_t begin, std::int64_t end,
                 std::int64_t row, std::int64_t rows) {
  const Layout& l = *a.layout;
  const std::int64_t length = (end - begin) / streams;
  const TileFn tile = direct_tile(l.num_bits, rows, streams);
  for (std::int64_t i = 0; i < length; ++i) {
    std::memset(frame.out, 0, static_cast<std::size_t>(streams * rows * kRows) * sizeof(float));
    tile({&l, &acts, 0, row, a.panels + (begin + i) * l.panel_bytes, length * l.panel_bytes, 0, l.blocks, frame.kept,
          frame.kept_scales, frame.kept, 0, frame.part, frame.out, frame.seventh});
    for (std::int64_t s = 0; s < streams; ++s)
      finish_panel(a, acts, begin + i + s * length, row, rows, frame.out + s * rows * kRows);
  }
  if (streams > 1) run_streams(a, acts, frame, 1, begin + streams * length, end, row, rows);
}

// All tiles of a row block through one panel, a stretch of inputs at a time so that its codes stay in L1. The first
// tile unpacks them as it goes, the others read what it kept, and the last prefetches the next stretch.
void run_panel(const MatmulArgs& a, const Acts& acts, Frame& frame, std::int64_t panel, std::int64_t row,
               std::int64_t rows) {
  const Layout& l = *a.layout;
  const bool wide = l.num_bits == 8;
  const std::uint8_t* codes = a.panels + panel * l.panel_bytes;
  const std::int64_t stretch = acts.packed ? (rows > 48 ? 16384 : kKeptBytes) / kept_bytes(wide) / l.block_k : l.blocks;
  std::memset(frame.out, 0, static_cast<std::size_t>(rows * kRows) * sizeof(float));
  for (std::int64_t b = 0; b < l.blocks; b += stretch) {
    Tile tile{&l,
              &acts,
              acts.packed ? row / acts.width : 0,
              acts.packed ? row % acts.width : row,
              codes,
              0,
              b,
              min64(b + stretch, l.blocks),
              frame.kept,
              frame.kept_scales,
              frame.kept,
              0,
              frame.part,
              frame.out,
              frame.seventh};
    for (std::int64_t m = 0; m < rows;) {
      const std::int64_t size = !acts.packed ? rows : min64(rows - m, acts.width - tile.lane);
      tile.out = frame.out + m * kRows;
      if (m > 0 && m + size == rows) {
        tile.ahead = codes + l.block_offset(tile.end);
        tile.ahead_step = wide ? 64 : 16 * l.num_bits;
      }
      const TileFn run = !acts.packed ? direct_tile(l.num_bits, size, 1)
                         : m > 0      ? kept_tile(l.num_bits, size)
                                      : keeping_tile(l.num_bits, size);
      run(tile);
      m += size;
      ++tile.tile;
      tile.lane = 0;
    }
  }
  finish_panel(a, acts, panel, row, rows, frame.out);
}

template <Compute Mode>
void run_rows(const MatmulArgs& a, std::int64_t panel_begin, std::int64_t panel_end, std::int64_t row_begin,
              std::int64_t row_end) {
  const Acts acts(*a.layout, a.rows, Mode, a.workspace);
  Frame frame;
  const std::int64_t end = row_end * acts.planes;
  for (std::int64_t row = row_begin * acts.planes; row < end;) {
    // Whole tiles, but at the end.
    const std::int64_t tiles = next_tile((end - row + kTile - 1) / kTile, kRowBlock / kTile);
    const std::int64_t rows = acts.rows > kEvenRows ? min64(end - row, tiles * kTile) : end - row;
    if (!acts.packed && rows <= 2)
      run_streams(a, acts, frame, rows == 1 ? 4 : 2, panel_begin, panel_end, row, rows);
    else
      for (std::int64_t panel = panel_begin; panel < panel_end; ++panel) run_panel(a, acts, frame, panel, row, rows);
    row += rows;
  }
}

}  // namespace
}  // namespace qtale::cpu

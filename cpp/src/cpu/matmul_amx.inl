// int8 qmatmul on AMX over 64-row panels: codes are unpacked once for all rows and multiplied in units of 32 rows and
// 32 columns, four tiles of sums; while the first tiles of a unit are multiplied, AVX-512 scales the sums of the one
// before and unpacks some of the codes that come next. In int16 mode an activation row is two rows of codes: rows are
// those here, but for those of outputs.
#pragma once

#include "cpu/matmul_amx_sums.inl"
#include "cpu/matmul_avx512.inl"

namespace qtale::cpu {
namespace {

constexpr std::int64_t kPartK = 2048;    // inputs of a panel that are unpacked at once
constexpr std::int64_t kStripRows = 64;  // rows that share a group of codes while it is in L1

// The rows of one unit, and how much of their activations and of the unpacked codes it multiplies.
struct Unit {
  const std::int8_t* act;
  std::int64_t act_stride;  // to the second 16 rows
  const std::uint8_t* codes;
  std::int64_t blocks, size, step_k;  // weight blocks of `size` inputs, `step_k` at a time
  std::int32_t* sums;
};

// What AVX-512 does beside the tiles.
struct Meanwhile {
  Sums before;
  Unpacking next;
  std::int64_t pace = 0;  // steps of `next` for each unit

  void run() {
    before.finish();
    next.some(pace);
  }
};

template <bool SignedCodes, int RowTiles>
QTALE_INLINE void multiply_step(const std::int8_t* act, std::int64_t act_stride, const std::uint8_t* codes) {
  load_tile<6>(codes, kLineStride);
  load_tile<4>(act, kTileK);
  multiply_tiles<SignedCodes, 0, 4, 6>();
  load_tile<7>(codes + 64, kLineStride);
  multiply_tiles<SignedCodes, 1, 4, 7>();
  if constexpr (RowTiles == 2) {
    load_tile<5>(act + act_stride, kTileK);
    multiply_tiles<SignedCodes, 2, 5, 6>();
    multiply_tiles<SignedCodes, 3, 5, 7>();
  }
}

// Sums of the unit before make room in time: they are scaled while the first products are on their way.
template <bool SignedCodes, int RowTiles>
void multiply_unit(const Unit& u, Meanwhile& meanwhile) {
  const std::int64_t steps = ceil_div(u.size, u.step_k);
  for (std::int64_t b = 0; b < u.blocks; ++b) {
    unroll<2 * RowTiles>([](auto tile) QTALE_INLINE_LAMBDA { zero_tile<tile>(); });
    for (std::int64_t step = 0; step < steps; ++step) {
      const std::int64_t k = b * u.size + step * u.step_k;
      const std::int8_t* act = u.act + k / kTileK * kTileBytes + k % kTileK;
      multiply_step<SignedCodes, RowTiles>(act, u.act_stride, u.codes + k * kRows);
      if (b == 0 && step == 0) meanwhile.run();
    }
    unroll<2 * RowTiles>([&](auto tile) QTALE_INLINE_LAMBDA {
      std::int32_t* sums = u.sums + b * kUnitSums + tile / 2 * kTileRows * kUnitCols + tile % 2 * 16;
      store_tile_sums<tile>(sums, kUnitCols * 4);
    });
  }
}

// One call of run: its scratch, and what of a panel is on its way.
template <int Planes>
class AmxRun {
 public:
  AmxRun(const MatmulArgs& a, Span outputs)
      : a_(a),
        l_(*a.layout),
        outputs_(outputs),
        rows_{outputs.begin * Planes, outputs.end * Planes},
        acts_(l_, a.rows * Planes, a.workspace),
        tiles_(l_, a.rows * Planes, a.workspace),
        group_blocks_(kActGroup / l_.block_k),
        reads_panel_(l_.per_channel && l_.num_bits == 8 && l_.k_padded % kTileK == 0),
        stream_(streams(a.y, a.rows, l_.n)),
        part_k_(part_k(rows_.end - rows_.begin)) {
    const ScratchSizes sizes(l_, part_k_);
    std::byte* at = a.scratch;
    for (int i = 0; i < 2; ++i) {
      parts_[i].codes = unpacked_[i] = reinterpret_cast<std::uint8_t*>(at);
      parts_[i].scales = reinterpret_cast<float*>(at += sizes.codes);
      parts_[i].zeros = reinterpret_cast<std::int32_t*>(at += sizes.params);
      at += sizes.params;
    }
    sums_ = reinterpret_cast<std::int32_t*>(at);
    out_ = reinterpret_cast<float*>(at += sizes.sums);
  }
  AmxRun(const AmxRun&) = delete;
  AmxRun& operator=(const AmxRun&) = delete;

  static std::size_t scratch_bytes(const Layout& l, std::int64_t rows) {
    const ScratchSizes sizes(l, part_k(rows * Planes));
    return static_cast<std::size_t>(2 * (sizes.codes + 2 * sizes.params) + sizes.sums + rows * kRows * 4);
  }

  void panels(Span panels) {
    tile_shapes(step_k()).use();
    begin_part(panels.begin, first_groups());
    for (std::int64_t panel = panels.begin; panel < panels.end; ++panel) run_panel(panel, panel + 1 < panels.end);
    release_tiles();
    if (stream_) _mm_sfence();
  }

 private:
  struct ScratchSizes {
    std::int64_t codes, params, sums;

    ScratchSizes(const Layout& l, std::int64_t part) {
      const std::int64_t k = min64(ceil_div(l.k_padded, kTileK) * kTileK, part);
      codes = k * kRows;
      params = l.per_channel ? 0 : k / l.block_k * kRows * 4;
      sums = kActGroup / l.block_k * kUnitSums * 4;
    }
  };

  // Few rows need unpacked codes so soon again that L1 may keep them.
  static std::int64_t part_k(std::int64_t rows) { return rows <= 3 * kStripRows ? kActGroup : kPartK; }
  std::int64_t step_k() const { return min64(l_.block_k, kTileK); }

  std::int64_t groups_of_part() const { return ceil_div(l_.act_groups, ceil_div(l_.k_padded, part_k_)); }
  Span first_groups() const { return {0, groups_of_part()}; }
  Span blocks_of(Span groups) const {
    return {groups.begin * group_blocks_, min64(l_.blocks, groups.end * group_blocks_)};
  }

  void run_panel(std::int64_t panel, bool another) {
    stored_ = claimed_ = outputs_.begin;
    ahead_ = a_.panels + (panel + 1) * l_.panel_bytes;
    ahead_lines_ = another && reads_panel_ ? ceil_div(l_.panel_bytes, 64 * units({0, l_.act_groups}, rows_)) : 0;
    for (Span groups = first_groups(); groups.begin < l_.act_groups;) {
      meanwhile_.next.rest();
      current_ = 1 - current_;
      const Span after{groups.end, min64(l_.act_groups, groups.end + groups_of_part())};
      if (after.begin < l_.act_groups) {
        begin_part(panel, after);
      } else if (another) {
        begin_part(panel + 1, first_groups());
      }
      meanwhile_.pace = ceil_div(Unpacking::steps(l_, groups_of_part() * group_blocks_), units(groups, rows_));
      for (std::int64_t m = rows_.begin; m < rows_.end; m += kStripRows)
        run_strip(panel, Span{m, min64(rows_.end, m + kStripRows)}, groups);
      meanwhile_.before.finish();
      groups = after;
    }
    store_rows(panel, outputs_.end);
  }

  // The part that follows the current one.
  void begin_part(std::int64_t panel, Span groups) {
    const std::uint8_t* codes = a_.panels + panel * l_.panel_bytes;
    const Span blocks = blocks_of(groups);
    PanelPart& part = parts_[1 - current_];
    if (reads_panel_) {
      part.codes = codes + l_.block_offset(blocks.begin);
    } else {
      meanwhile_.next = Unpacking(l_, codes, blocks, part, unpacked_[1 - current_]);
    }
  }

  static std::int64_t units(Span groups, Span rows) {
    return 2 * (groups.end - groups.begin) * ceil_div(rows.end - rows.begin, kUnitRows);
  }

  void run_strip(std::int64_t panel, Span rows, Span groups) {
    const bool last = groups.end == l_.act_groups;
    const std::int64_t pace = ceil_div(kStripRows, units(groups, rows));
    for (std::int64_t g = groups.begin; g < groups.end; ++g)
      for (std::int64_t m = rows.begin; m < rows.end; m += kUnitRows)
        for (std::int64_t col = 0; col < kRows; col += kUnitCols) {
          run_unit(groups.begin, g, m, min64(kUnitRows, rows.end - m), col);
          if (!last) continue;
          store_rows(panel, min64(rows.begin / Planes, stored_ + pace));
          claim_rows(panel, min64(rows.end / Planes, claimed_ + pace));
        }
  }

  void run_unit(std::int64_t first_group, std::int64_t g, std::int64_t m, std::int64_t rows, std::int64_t col) {
    const std::int64_t b = g * group_blocks_, part_block = b - first_group * group_blocks_;
    for (int i = 0; i < ahead_lines_; ++i, ahead_ += 64)
      _mm_prefetch(reinterpret_cast<const char*>(ahead_), _MM_HINT_T0);
    Unit unit;
    unit.act = tiles_.at(m, g * kActGroup);
    unit.act_stride = tiles_.row_bytes;
    const PanelPart& part = parts_[current_];
    unit.codes = part.codes + part_block * l_.block_k * kRows + col * 4;
    unit.blocks = min64(group_blocks_, l_.blocks - b);
    unit.size = l_.block_size(b);
    unit.step_k = step_k();
    unit.sums = sums_;
    multiply(unit, rows);
    Sums& before = meanwhile_.before;
    before.sums = unit.sums;
    before.scales = part.scales + part_block * kRows + col;
    before.zeros = part.zeros + part_block * kRows + col;
    before.act = acts_.scales + m * l_.act_groups + g;
    before.ld_act = l_.act_groups;
    before.act_sums = acts_.sums + m * l_.blocks + b;
    before.ld_act_sums = l_.blocks;
    before.out = out_ + (m - rows_.begin) / Planes * kRows + col;
    before.add = g == 0 ? kNoSums : before.out;
    before.ld_add = g == 0 ? 0 : kRows;
    before.rows = rows;
    before.scale = pick_scale<Planes>(l_, unit.blocks);
  }

  void multiply(const Unit& unit, std::int64_t rows) {
    if (l_.per_channel) {
      rows > kTileRows ? multiply_unit<false, 2>(unit, meanwhile_) : multiply_unit<false, 1>(unit, meanwhile_);
    } else {
      rows > kTileRows ? multiply_unit<true, 2>(unit, meanwhile_) : multiply_unit<true, 1>(unit, meanwhile_);
    }
  }

  void claim_rows(std::int64_t panel, std::int64_t end) {
    if (stream_ || claimed_ >= end) return;
    claim_outputs(a_, panel, claimed_, end - claimed_);
    claimed_ = end;
  }

  void store_rows(std::int64_t panel, std::int64_t end) {
    if (stored_ >= end) return;
    float* out = out_ + (stored_ - outputs_.begin) * kRows;
    if (l_.per_channel)
      finish_channel(l_, a_.panels + panel * l_.panel_bytes, acts_.totals + stored_, end - stored_, out);
    store_tile(a_, panel, stored_, end - stored_, out, stream_);
    stored_ = end;
  }

  const MatmulArgs& a_;
  const Layout& l_;
  Span outputs_, rows_;
  Int8Rows acts_;
  ActTiles tiles_;
  std::int64_t group_blocks_;
  bool reads_panel_;  // codes lie there as tiles want them
  bool stream_;
  std::int64_t part_k_;
  std::uint8_t* unpacked_[2];
  PanelPart parts_[2];
  int current_ = 0;  // of the parts: the one that is multiplied
  std::int32_t* sums_;
  float* out_;
  Meanwhile meanwhile_;
  const std::uint8_t* ahead_ = nullptr;
  std::int64_t ahead_lines_ = 0;
  std::int64_t stored_ = 0, claimed_ = 0;  // rows of the panel before these are in y, or their lines asked for
};

template <int Planes>
void run_amx(const MatmulArgs& a, std::int64_t panel_begin, std::int64_t panel_end, std::int64_t row_begin,
             std::int64_t row_end) {
  if ((row_end - row_begin) * Planes < fewest_rows(*a.layout) || a.layout->act_groups == 0) {
    run_int8<Planes>(a, panel_begin, panel_end, row_begin, row_end);
  } else {
    AmxRun<Planes>(a, {row_begin, row_end}).panels({panel_begin, panel_end});
  }
}

}  // namespace
}  // namespace qtale::cpu

// qmatmul in plain C++ over 16-row panels: every machine can run it, compilers vectorize its inner loops.
#include "cpu/activations.inl"

namespace qtale::cpu {
namespace {

constexpr int kRows = 16;

// Codes of one block minus zero points, [k][16].
void unpack_block(const Layout& l, const std::uint8_t* panel, std::int64_t b, std::int16_t (*out)[kRows]) {
  const std::uint8_t* block = panel + l.block_offset(b);
  const auto* zero = reinterpret_cast<const std::int8_t*>(panel + l.param_offset(b) + l.scale_bytes);
  const std::int64_t size = l.block_size(b);
  std::int8_t row[kActGroup];
  for (int r = 0; r < kRows; ++r) {
    read_row(l, block, r, size, row);
    const int z = l.symmetric ? 0 : zero[r];
    for (std::int64_t k = 0; k < size; ++k) out[k][r] = static_cast<std::int16_t>(row[k] - z);
  }
}

void load_scales(const Layout& l, const std::uint8_t* panel, std::int64_t b, float* out) {
  for (int r = 0; r < kRows; ++r) out[r] = load_scalar(panel + l.param_offset(b), l.scale_dtype, r);
}

void finish(const MatmulArgs& a, std::int64_t m, std::int64_t panel, const float* values) {
  const std::int64_t col = panel * kRows;
  store_outputs(a, m, col, values, min64(kRows, a.layout->n - col));
}

// Rows of one panel at a time: the block is unpacked once for up to kBatch rows.
constexpr std::int64_t kBatch = 32;

template <int Planes>
void run_int8(const MatmulArgs& a, std::int64_t panel_begin, std::int64_t panel_end, std::int64_t row_begin,
              std::int64_t row_end) {
  const Layout& l = *a.layout;
  const Int8Rows acts(l, a.rows * Planes, a.workspace);
  std::int16_t codes[kActGroup][kRows];
  float scales[kRows], out[kBatch][kRows];
  for (std::int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const std::uint8_t* base = a.panels + panel * l.panel_bytes;
    for (std::int64_t m0 = row_begin; m0 < row_end; m0 += kBatch) {
      const std::int64_t batch = min64(kBatch, row_end - m0);
      std::memset(out, 0, sizeof out);
      for (std::int64_t b = 0; b < l.blocks; ++b) {
        unpack_block(l, base, b, codes);
        load_scales(l, base, b, scales);
        const std::int64_t k0 = b * l.block_k, size = l.block_size(b);
        for (std::int64_t m = 0; m < batch * Planes; ++m) {
          const std::int64_t row = m0 * Planes + m;
          const std::int8_t* x = acts.codes + row * l.k_padded + k0;
          std::int32_t sum[kRows] = {};
          for (std::int64_t k = 0; k < size; ++k)
            for (int r = 0; r < kRows; ++r) sum[r] += codes[k][r] * x[k];
          const float scale = acts.scales[row * l.act_groups + k0 / kActGroup];
          for (int r = 0; r < kRows; ++r) out[m / Planes][r] += static_cast<float>(sum[r]) * scales[r] * scale;
        }
      }
      for (std::int64_t m = 0; m < batch; ++m) finish(a, m0 + m, panel, out[m]);
    }
  }
}

std::size_t float_bytes(const Layout& l, std::int64_t rows) {
  return aligned(static_cast<std::size_t>(rows * l.k_padded) * sizeof(float));
}

void prepare_float(const MatmulArgs& a, std::int64_t begin, std::int64_t end) {
  auto* out = reinterpret_cast<float*>(a.workspace);
  for (std::int64_t m = begin; m < end; ++m)
    for (std::int64_t k = 0; k < a.layout->k_padded; ++k)
      out[m * a.layout->k_padded + k] = k < a.layout->k ? load_scalar(a.x.data, a.x.dtype, m * a.x.stride + k) : 0.0f;
}

void run_float(const MatmulArgs& a, std::int64_t panel_begin, std::int64_t panel_end, std::int64_t row_begin,
               std::int64_t row_end) {
  const Layout& l = *a.layout;
  const auto* acts = reinterpret_cast<const float*>(a.workspace);
  std::int16_t codes[kActGroup][kRows];
  float scales[kRows], out[kBatch][kRows];
  for (std::int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const std::uint8_t* base = a.panels + panel * l.panel_bytes;
    for (std::int64_t m0 = row_begin; m0 < row_end; m0 += kBatch) {
      const std::int64_t batch = min64(kBatch, row_end - m0);
      std::memset(out, 0, sizeof out);
      for (std::int64_t b = 0; b < l.blocks; ++b) {
        unpack_block(l, base, b, codes);
        load_scales(l, base, b, scales);
        const std::int64_t size = l.block_size(b);
        for (std::int64_t m = 0; m < batch; ++m) {
          const float* x = acts + (m0 + m) * l.k_padded + b * l.block_k;
          float sum[kRows] = {};
          for (std::int64_t k = 0; k < size; ++k)
            for (int r = 0; r < kRows; ++r) sum[r] += static_cast<float>(codes[k][r]) * x[k];
          for (int r = 0; r < kRows; ++r) out[m][r] += sum[r] * scales[r];
        }
      }
      for (std::int64_t m = 0; m < batch; ++m) finish(a, m0 + m, panel, out[m]);
    }
  }
}

}  // namespace

}  // namespace qtale::cpu

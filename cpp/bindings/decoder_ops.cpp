#include "qtale/decoder_ops.h"

#include "qtale/error.h"
#include "tensor.h"

namespace py = pybind11;

namespace qtale::bindings {
namespace {

using Release = py::call_guard<py::gil_scoped_release>;

// The addresses of pages, each an array of kv_page_bytes bytes.
std::vector<void*> addresses(const std::vector<Memory>& pages, std::int64_t page_bytes) {
  std::vector<void*> out;
  for (const Memory& page : pages) {
    const TensorView t = view(page);
    if (!t.is_contiguous() || t.numel() * size_of(t.dtype) != page_bytes || t.device.type != DeviceType::cpu)
      throw InputError("kv pages: a page is not contiguous memory of " + std::to_string(page_bytes) +
                       " bytes on the CPU; kv_page_bytes tells the size.");
    out.push_back(t.data);
  }
  return out;
}

std::int64_t bytes_of_page(const TensorView& heads, std::int64_t kv_heads, DType dtype) {
  return kv_page_bytes(kv_heads, heads.rank == 3 ? heads.shape[2] : 0, dtype);
}

void append(const Memory& k, const Memory& v, const std::vector<Memory>& pages, std::int64_t first,
            const std::string& dtype) {
  const TensorView keys = view(k);
  const DType type = dtype_from_name(dtype);
  const std::int64_t kv_heads = keys.rank == 3 ? keys.shape[1] : 0;
  kv_append(keys, view(v), addresses(pages, bytes_of_page(keys, kv_heads, type)), first, type);
}

// Runs are (rows, pages) that follow each other.
void attend(const Memory& q, const std::vector<std::pair<std::int64_t, std::vector<Memory>>>& runs, const Memory& begin,
            const Memory& end, std::int64_t kv_heads, const std::string& dtype, float scale, const Memory& out,
            const std::string& compute) {
  const TensorView queries = view(q);
  const DType type = dtype_from_name(dtype);
  const std::int64_t page_bytes = bytes_of_page(queries, kv_heads, type);
  std::vector<std::vector<void*>> pages;
  std::vector<AttentionRun> views;
  for (const auto& run : runs) pages.push_back(addresses(run.second, page_bytes));
  std::int64_t row = 0;
  for (std::size_t i = 0; i < runs.size(); row += runs[i].first, ++i) views.push_back({row, runs[i].first, pages[i]});
  attention(queries, views, view(begin), view(end), kv_heads, type, scale, view(out),
            compute_from_name("attention", compute));
}

}  // namespace

void register_decoder_ops(py::module_& module) {
  module.def(
      "round_weights", [](const Memory& matrix, const Memory& rounded) { round_weights(view(matrix), view(rounded)); },
      Release());
  module.def(
      "rms_norm",
      [](const Memory& x, const Memory& weight, float eps, const Memory& out) {
        rms_norm(view(x), view(weight), eps, view(out));
      },
      Release());
  module.def(
      "rope",
      [](const Memory& x, const Memory& table, const Memory& positions) {
        rope(view(x), view(table), view(positions));
      },
      Release());
  module.def(
      "silu_mul", [](const Memory& gate_up, const Memory& out) { silu_mul(view(gate_up), view(out)); }, Release());
  module.def("has_int8_keys", has_int8_keys);
  module.def("kv_page_bytes", [](std::int64_t kv_heads, std::int64_t head_dim, const std::string& dtype) {
    return kv_page_bytes(kv_heads, head_dim, dtype_from_name(dtype));
  });
  module.def("kv_append", append, Release());
  module.def("attention", attend, Release());
}

}  // namespace qtale::bindings

#include "qtale/limits.h"

#include "qtale/error.h"
#include "tensor.h"

namespace py = pybind11;

namespace qtale::bindings {
namespace {

using Release = py::call_guard<py::gil_scoped_release>;

std::int64_t bytes_of(const TensorView& t) {
  if (!t.is_contiguous() || t.device.type != DeviceType::cpu)
    throw InputError("limits: the buffer is not contiguous memory of the CPU; pass one that is.");
  return t.numel() * size_of(t.dtype);
}

double read_pass(const std::vector<Memory>& buffers, int reader) {
  std::vector<Span> spans;
  for (const Memory& buffer : buffers) {
    const TensorView t = view(buffer);
    spans.push_back({t.data, bytes_of(t)});
  }
  return read_seconds(spans, reader);
}

double copy_pass(const Memory& source, const Memory& target) {
  const TensorView from = view(source), to = view(target);
  if (bytes_of(from) != bytes_of(to))
    throw InputError("copy_seconds: source and target differ in size; pass buffers of equal size.");
  return copy_seconds(from.data, to.data, bytes_of(from));
}

Peak peak_from_name(const std::string& name) {
  if (name == "int8_dot") return Peak::int8_dot;
  if (name == "int8_tile") return Peak::int8_tile;
  if (name == "u4_int16") return Peak::u4_int16;
  if (name == "f32_fma") return Peak::f32_fma;
  throw InputError("measure_peak: '" + name + "' is no limit; use 'int8_dot', 'int8_tile', 'u4_int16' or 'f32_fma'.");
}

}  // namespace

void register_limits(py::module_& module) {
  module.def("reader_names", reader_names);
  module.def("read_seconds", read_pass, Release());
  module.def("copy_seconds", copy_pass, Release());
  module.def(
      "measure_memory",
      [](std::int64_t bytes, int passes) {
        const MemoryLimits found = measure_memory(bytes, passes);
        return std::tuple(found.read, found.reader, found.copy);
      },
      Release());
  module.def(
      "measure_peak",
      [](const std::string& peak, double seconds) { return measure_peak(peak_from_name(peak), seconds); }, Release());
}

}  // namespace qtale::bindings

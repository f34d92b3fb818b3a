#include "qtale/ops.h"

#include "qtale/error.h"
#include "tensor.h"

namespace py = pybind11;

namespace qtale::bindings {
namespace {

using Release = py::call_guard<py::gil_scoped_release>;

PrepackedInfo make_info(std::int64_t out, std::int64_t in, std::int64_t groups, int num_bits, bool symmetric,
                        const std::string& scale_dtype) {
  return {out, in, groups, num_bits, symmetric, dtype_from_name(scale_dtype)};
}

}  // namespace

Compute compute_from_name(const std::string& op, const std::string& name) {
  if (name == "int8") return Compute::int8;
  if (name == "int16") return Compute::int16;
  if (name == "float") return Compute::floating;
  if (name == "bfloat16") return Compute::bfloat16;
  throw InputError(op + ": compute '" + name + "' is not a mode; use 'int8', 'int16', 'float' or 'bfloat16'.");
}

void register_ops(py::module_& module) {
  module.def(
      "quantize",
      [](const Memory& weight, int num_bits, const Memory& codes, const Memory& scale, const OptionalMemory& zero) {
        quantize(view(weight), num_bits, view(codes), view(scale), OptionalView(zero).get());
      },
      Release());
  module.def(
      "dequantize",
      [](const Memory& codes, const Memory& scale, const OptionalMemory& zero, const Memory& out) {
        dequantize(view(codes), view(scale), OptionalView(zero).get(), view(out));
      },
      Release());
  module.def(
      "fake_quantize",
      [](const Memory& x, const Memory& scale, const OptionalMemory& zero, int num_bits, const Memory& out) {
        fake_quantize(view(x), view(scale), OptionalView(zero).get(), num_bits, view(out));
      },
      Release());
  module.def(
      "pack", [](const Memory& codes, int bits, const Memory& packed) { pack(view(codes), bits, view(packed)); },
      Release());
  module.def(
      "unpack", [](const Memory& packed, int bits, const Memory& codes) { unpack(view(packed), bits, view(codes)); },
      Release());
  module.def("prepacked_bytes", [](std::int64_t out, std::int64_t in, std::int64_t groups, int num_bits, bool symmetric,
                                   const std::string& scale_dtype) {
    return prepacked_bytes(make_info(out, in, groups, num_bits, symmetric, scale_dtype));
  });
  module.def(
      "prepack",
      [](const Memory& codes, const Memory& scale, const OptionalMemory& zero, int num_bits, const Memory& buffer) {
        prepack(view(codes), view(scale), OptionalView(zero).get(), num_bits, view(buffer));
      },
      Release());
  module.def("prepacked_info", [](const Memory& buffer) {
    const PrepackedInfo info = prepacked_info(view(buffer));
    return py::make_tuple(info.out_features, info.in_features, info.groups, info.num_bits, info.symmetric,
                          std::string(name_of(info.scale_dtype)));
  });
  module.def(
      "unprepack",
      [](const Memory& buffer, const Memory& codes, const Memory& scale, const OptionalMemory& zero) {
        unprepack(view(buffer), view(codes), view(scale), OptionalView(zero).get());
      },
      Release());
  module.def(
      "qmatmul",
      [](const Memory& x, const Memory& prepacked, const OptionalMemory& bias, const Memory& y,
         const std::string& compute) {
        qmatmul(view(x), view(prepacked), OptionalView(bias).get(), view(y), compute_from_name("qmatmul", compute));
      },
      Release());
  module.def(
      "project_topk",
      [](const Memory& x, const Memory& matrix, const Memory& values, const Memory& indices) {
        project_topk(view(x), view(matrix), view(values), view(indices));
      },
      Release());
  module.def(
      "jaccard", [](const Memory& a, const Memory& b, const Memory& out) { jaccard(view(a), view(b), view(out)); },
      Release());
}

}  // namespace qtale::bindings

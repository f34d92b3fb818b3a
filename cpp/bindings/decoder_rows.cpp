#include "qtale/decoder_ops.h"
#include "tensor.h"

namespace py = pybind11;

namespace qtale::bindings {
namespace {

using Release = py::call_guard<py::gil_scoped_release>;

}  // namespace

void register_decoder_rows(py::module_& module) {
  module.def(
      "matmul",
      [](const Memory& x, const Memory& weight, const OptionalMemory& bias, const Memory& y,
         const std::string& compute) {
        matmul(view(x), view(weight), OptionalView(bias).get(), view(y), compute_from_name("matmul", compute));
      },
      Release());
  module.def(
      "compact_rows",
      [](const Memory& x, const Memory& indices, const Memory& out) {
        compact_rows(view(x), view(indices), view(out));
      },
      Release());
  module.def(
      "scatter_add_rows",
      [](const Memory& delta, const Memory& indices, const OptionalMemory& gates, const Memory& x) {
        scatter_add_rows(view(delta), view(indices), OptionalView(gates).get(), view(x));
      },
      Release());
}

}  // namespace qtale::bindings

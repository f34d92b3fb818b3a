#include "qtale/solve.h"

#include "tensor.h"

namespace py = pybind11;

namespace qtale::bindings {
namespace {

using Release = py::call_guard<py::gil_scoped_release>;
using Search = std::tuple<int, float, float, bool>;  // steps, widest, narrowest, signed

ScaleSearch search_of(const Search& search) {
  const auto& [steps, widest, narrowest, is_signed] = search;
  return {steps, widest, narrowest, is_signed};
}

void solve_gptq(const Memory& weight, const Memory& factor, const OptionalMemory& order, int num_bits,
                const Memory& scale, const OptionalMemory& zero_point, bool static_scales, const Memory& codes,
                const OptionalMemory& loss, const Search& search, const OptionalMemory& importance) {
  gptq(view(weight), view(factor), OptionalView(order).get(), num_bits, view(scale), OptionalView(zero_point).get(),
       static_scales, view(codes), OptionalView(loss).get(), search_of(search), OptionalView(importance).get());
}

void search(const Memory& weight, const Memory& importance, int num_bits, const Memory& scale,
            const OptionalMemory& zero_point, const Search& search) {
  search_scales(view(weight), view(importance), num_bits, view(scale), OptionalView(zero_point).get(),
                search_of(search));
}

std::int64_t refine(const Memory& weight, const Memory& hessian, int num_bits, const Memory& scale,
                    const OptionalMemory& zero_point, const OptionalMemory& order, int sweeps, const Memory& codes) {
  return refine_codes(view(weight), view(hessian), num_bits, view(scale), OptionalView(zero_point).get(),
                      OptionalView(order).get(), sweeps, view(codes));
}

std::int64_t refit(const Memory& weight, const Memory& hessian, int num_bits, const Memory& codes,
                   const OptionalMemory& zero_point, const Memory& scale) {
  return refit_scales(view(weight), view(hessian), num_bits, view(codes), OptionalView(zero_point).get(), view(scale));
}

double loss_of_rounding(const Memory& weight, const Memory& hessian, const OptionalMemory& column_scale, int num_bits,
                        std::int64_t group_size, bool symmetric, const std::string& scale_dtype) {
  return rounding_loss(view(weight), view(hessian), OptionalView(column_scale).get(), num_bits, group_size, symmetric,
                       dtype_from_name(scale_dtype));
}

}  // namespace

void register_solve(py::module_& module) {
  module.def("gptq", solve_gptq, Release());
  module.def("search_scales", search, Release());
  module.def("refine_codes", refine, Release());
  module.def("refit_scales", refit, Release());
  module.def(
      "prox_linf",
      [](const Memory& values, std::int64_t group_size, float step, const Memory& out) {
        prox_linf(view(values), group_size, step, view(out));
      },
      Release());
  module.def(
      "project_l1",
      [](const Memory& values, std::int64_t group_size, float radius, const Memory& out) {
        project_l1(view(values), group_size, radius, view(out));
      },
      Release());
  module.def("rounding_loss", loss_of_rounding, Release());
  module.def(
      "accumulate_gram",
      [](const Memory& x, const OptionalMemory& row_weight, const Memory& gram) {
        accumulate_gram(view(x), OptionalView(row_weight).get(), view(gram));
      },
      Release());
}

}  // namespace qtale::bindings

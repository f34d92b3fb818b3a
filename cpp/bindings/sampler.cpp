#include "qtale/sampler.h"

#include "qtale/parallel.h"
#include "tensor.h"

namespace py = pybind11;

namespace qtale::bindings {
namespace {

using Sources = std::vector<std::shared_ptr<TokenSource>>;
using Options = std::tuple<double, std::int64_t, double, double, double>;  // in the order of SamplingOptions

std::vector<std::int32_t> sample_rows(const Memory& logits, const Sources& sources, const Options& options,
                                      int num_threads) {
  const auto& [temperature, top_k, top_p, min_p, repetition_penalty] = options;
  const ThreadLimit limit(num_threads);
  return sample(view(logits), sources, {temperature, top_k, top_p, min_p, repetition_penalty});
}

}  // namespace

void register_sampler(py::module_& module) {
  py::class_<TokenSource, std::shared_ptr<TokenSource>>(module, "TokenSource")
      .def(py::init<std::uint64_t, std::uint64_t>())
      .def("see", [](TokenSource& source, const std::vector<std::int64_t>& tokens) { source.see(tokens); })
      .def("seen",
           [](const TokenSource& source) {
             return std::vector<std::int32_t>(source.seen().begin(), source.seen().end());
           })
      .def("uniform", &TokenSource::uniform);
  module.def("sample", sample_rows, py::call_guard<py::gil_scoped_release>());
}

}  // namespace qtale::bindings

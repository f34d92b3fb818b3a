// How Python hands memory over: (pointer, dtype name, shape, strides, device index or -1 for the CPU).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "qtale/ops.h"
#include "qtale/tensor.h"

namespace qtale::bindings {

using Memory = std::tuple<std::uintptr_t, std::string, std::vector<std::int64_t>, std::vector<std::int64_t>, int>;

DType dtype_from_name(const std::string& name);
TensorView view(const Memory& memory);
Compute compute_from_name(const std::string& op, const std::string& name);

void register_decoder(pybind11::module_& module);
using OptionalMemory = std::optional<Memory>;

// Keeps the view of an optional argument alive for one call.
struct OptionalView {
  explicit OptionalView(const OptionalMemory& memory) {
    if (memory) view_ = view(*memory);
  }
  const TensorView* get() const { return view_ ? &*view_ : nullptr; }

 private:
  std::optional<TensorView> view_;
};

void register_decoder_rows(pybind11::module_& module);
void register_decoder_ops(pybind11::module_& module);
void register_limits(pybind11::module_& module);
void register_ops(pybind11::module_& module);
void register_sampler(pybind11::module_& module);
void register_solve(pybind11::module_& module);

}  // namespace qtale::bindings

#include <map>

#include "qtale/device.h"
#include "qtale/error.h"
#include "qtale/parallel.h"
#include "tensor.h"

namespace py = pybind11;

namespace qtale::bindings {

DType dtype_from_name(const std::string& name) {
  static const std::map<std::string, DType> dtypes = {
      {"float32", DType::f32}, {"float16", DType::f16}, {"bfloat16", DType::bf16}, {"int8", DType::s8},
      {"uint8", DType::u8},    {"int32", DType::s32},   {"int64", DType::s64},     {"float64", DType::f64}};
  const auto found = dtypes.find(name);
  if (found == dtypes.end())
    throw InputError("dtype '" + name +
                     "' is not supported; use float32, float16, bfloat16, int8, uint8, int32, int64 or float64.");
  return found->second;
}

TensorView view(const Memory& memory) {
  const auto& [pointer, dtype, shape, strides, device] = memory;
  if (shape.size() > kMaxRank || shape.size() != strides.size())
    throw InputError("a tensor of rank " + std::to_string(shape.size()) + " is not supported; use up to 4 dimensions.");
  TensorView out;
  out.data = reinterpret_cast<void*>(pointer);
  out.dtype = dtype_from_name(dtype);
  out.rank = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), out.shape.begin());
  std::copy(strides.begin(), strides.end(), out.strides.begin());
  if (device >= 0) out.device = {DeviceType::cuda, device};
  return out;
}

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = QTALE_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["cuda"] = cuda_built();
  info["cuda_reason"] = cuda_reason();
  return info;
}

// qtale.errors is the one hierarchy that users see; C++ errors are raised as its classes.
void translate_errors() {
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const InputError& e) {
      py::set_error(py::module_::import("qtale.errors").attr("InputError"), e.what());
    } catch (const Error& e) {
      py::set_error(py::module_::import("qtale.errors").attr("Error"), e.what());
    }
  });
}

}  // namespace
}  // namespace qtale::bindings

PYBIND11_MODULE(_core, module, py::mod_gil_not_used()) {
  using namespace qtale;
  bindings::translate_errors();
  module.doc() = "The C++ core of qtale; qtale.ops is its public face.";
  module.def("build_info", bindings::build_info);
  module.def("cpu_isas", cpu_isas);
  module.def("cpu_isa", cpu_isa);
  module.def("has_bfloat16", has_bfloat16);
  module.def("has_tiles", has_tiles);
  module.def("set_cpu_isa", set_cpu_isa);
  module.def("num_threads", num_threads);
  module.def("set_num_threads", set_num_threads);
  bindings::register_decoder(module);
  bindings::register_decoder_rows(module);
  bindings::register_decoder_ops(module);
  bindings::register_limits(module);
  bindings::register_ops(module);
  bindings::register_sampler(module);
  bindings::register_solve(module);
}

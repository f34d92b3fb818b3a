// The decoder for Python. Weights are not owned: the caller keeps their memory alive.
#include <chrono>
#include <string>

#include "qtale/engine.h"
#include "qtale/error.h"
#include "tensor.h"

namespace py = pybind11;

namespace qtale::bindings {
namespace {

using OptionalMemory = std::optional<Memory>;
using Part = std::pair<Memory, OptionalMemory>;
// sequence, parent or -1, tokens, tokens of the whole text or 0
using SegmentTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

std::optional<TensorView> optional_view(const py::dict& values, const char* name) {
  if (!values.contains(name) || values[name].is_none()) return std::nullopt;
  return view(values[name].cast<Memory>());
}

Matrix matrix_of(const Part& part) {
  Matrix matrix{view(part.first), std::nullopt};
  if (part.second) matrix.bias = view(*part.second);
  return matrix;
}

Projection projection_of(const py::object& parts) {
  Projection projection;
  for (const Part& part : parts.cast<std::vector<Part>>()) projection.push_back(matrix_of(part));
  return projection;
}

Router router_of(const py::dict& values) {
  Router router;
  router.w1 = view(values["w1"].cast<Memory>());
  router.bias1 = optional_view(values, "bias1");
  router.norm = optional_view(values, "norm");
  router.w2 = optional_view(values, "w2");
  router.bias2 = optional_view(values, "bias2");
  if (values.contains("norm_eps")) router.norm_eps = values["norm_eps"].cast<float>();
  return router;
}

DecoderLayer layer_of(const py::dict& values) {
  DecoderLayer layer;
  layer.input_norm = view(values["input_norm"].cast<Memory>());
  layer.post_norm = view(values["post_norm"].cast<Memory>());
  layer.q_norm = optional_view(values, "q_norm");
  layer.k_norm = optional_view(values, "k_norm");
  layer.qkv = projection_of(values["qkv"]);
  layer.o = projection_of(values["o"]);
  layer.gate_up = projection_of(values["gate_up"]);
  layer.down = projection_of(values["down"]);
  if (values.contains("window")) layer.window = values["window"].cast<std::int64_t>();
  if (values.contains("router") && !values["router"].is_none()) layer.router = router_of(values["router"]);
  return layer;
}

// The one of two names that a setting has.
bool is_second(const std::string& setting, const std::string& value, const char* first, const char* second) {
  if (value == second) return true;
  if (value == first) return false;
  throw InputError("Decoder: " + setting + " '" + value + "' is not known; use '" + first + "' or '" + second + "'.");
}

RopeSpec rope_of(const py::dict& config) {
  RopeSpec rope;
  rope.inv_freq = config["inv_freq"].cast<std::vector<float>>();
  rope.attention_factor = config["attention_factor"].cast<float>();
  rope.dynamic_base = config["dynamic_base"].cast<double>();
  rope.dynamic_factor = config["dynamic_factor"].cast<double>();
  rope.dynamic_length = config["dynamic_length"].cast<std::int64_t>();
  return rope;
}

DecoderSpec spec_of(const py::dict& config) {
  DecoderSpec spec;
  spec.hidden_size = config["hidden_size"].cast<std::int64_t>();
  spec.intermediate_size = config["intermediate_size"].cast<std::int64_t>();
  spec.num_heads = config["num_heads"].cast<std::int64_t>();
  spec.num_kv_heads = config["num_kv_heads"].cast<std::int64_t>();
  spec.head_dim = config["head_dim"].cast<std::int64_t>();
  spec.vocab_size = config["vocab_size"].cast<std::int64_t>();
  spec.context = config["context"].cast<std::int64_t>();
  spec.norm_eps = config["norm_eps"].cast<float>();
  spec.attention_scale = config["attention_scale"].cast<float>();
  spec.rope = rope_of(config);
  spec.compute = compute_from_name("Decoder", config["compute"].cast<std::string>());
  spec.kv_dtype = dtype_from_name(config["kv_dtype"].cast<std::string>());
  const bool keep = is_second("kv_rule", config["kv_rule"].cast<std::string>(), "evict", "keep");
  spec.kv_rule = keep ? KvRule::keep : KvRule::evict;
  return spec;
}

std::unique_ptr<Decoder> make_decoder(const py::dict& config, const Memory& embedding, const Memory& final_norm,
                                      const Part& head, const std::vector<py::dict>& layers) {
  DecoderSpec spec = spec_of(config);
  spec.embedding = view(embedding);
  spec.final_norm = view(final_norm);
  spec.head = matrix_of(head);
  for (const py::dict& layer : layers) spec.layers.push_back(layer_of(layer));
  return std::make_unique<Decoder>(std::move(spec));
}

// A contiguous vector that Python lends.
template <class T>
std::span<const T> vector_of(const char* name, const Memory& memory, DType dtype) {
  const TensorView t = view(memory);
  if (t.dtype != dtype || t.rank != 1 || !t.is_contiguous() || t.device.type != DeviceType::cpu)
    throw InputError(std::string("Decoder: ") + name + " must be a contiguous vector of " +
                     std::string(name_of(dtype)) + " on the CPU.");
  return {t.as<const T>(), static_cast<std::size_t>(t.shape[0])};
}

std::vector<Segment> segments_of(const std::vector<SegmentTuple>& tuples, std::span<const std::int32_t> tokens) {
  std::vector<Segment> segments;
  std::size_t used = 0;
  for (const auto& [sequence, parent, count, text_length] : tuples) {
    if (count < 0 || static_cast<std::size_t>(count) > tokens.size() - used)
      throw InputError("Decoder: the segments count more tokens than are given.");
    segments.push_back({sequence, parent, tokens.subspan(used, static_cast<std::size_t>(count)), text_length});
    used += static_cast<std::size_t>(count);
  }
  return segments;
}

// Lets Ctrl-C through, at most every fiftieth of a second: signals wait for the lock of the interpreter.
class SignalPoll {
 public:
  void operator()() {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < std::chrono::milliseconds(20)) return;
    last_ = now;
    const py::gil_scoped_acquire lock;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

void forward(Decoder& decoder, const std::vector<SegmentTuple>& tuples, const Memory& tokens, const Memory& keep,
             const Memory& logits) {
  const auto segments = segments_of(tuples, vector_of<std::int32_t>("tokens", tokens, DType::s32));
  const auto rows = vector_of<std::int64_t>("keep", keep, DType::s64);
  const py::gil_scoped_release release;
  decoder.forward(segments, rows, view(logits), SignalPoll());
}

void score(Decoder& decoder, const std::vector<SegmentTuple>& tuples, const Memory& tokens, const Memory& keep,
           const Memory& targets, const Memory& log_probs, const Memory& greedy) {
  const auto segments = segments_of(tuples, vector_of<std::int32_t>("tokens", tokens, DType::s32));
  const auto rows = vector_of<std::int64_t>("keep", keep, DType::s64);
  const auto wanted = vector_of<std::int32_t>("targets", targets, DType::s32);
  const auto values = vector_of<float>("log_probs", log_probs, DType::f32);
  const auto best = vector_of<std::uint8_t>("greedy", greedy, DType::u8);
  if (values.size() != wanted.size() || best.size() != wanted.size())
    throw InputError("Decoder: log_probs and greedy need one place for each target.");
  const py::gil_scoped_release release;
  const std::vector<Score> scores = decoder.score(segments, rows, wanted, SignalPoll());
  for (std::size_t i = 0; i < scores.size(); ++i) {
    const_cast<float&>(values[i]) = scores[i].log_prob;
    const_cast<std::uint8_t&>(best[i]) = scores[i].greedy ? 1 : 0;
  }
}

py::tuple report(const Decoder& decoder) {
  std::vector<std::size_t> executed;
  for (const auto& rows : decoder.report().executed) executed.push_back(rows.size());
  return py::make_tuple(decoder.report().tokens, executed);
}

// Fills [layers, tokens] of the last call with whether the token executed the layer.
void decisions(const Decoder& decoder, const Memory& mask) {
  const auto runs = vector_of<std::uint8_t>("decisions", mask, DType::u8);
  const CallReport& report = decoder.report();
  const auto tokens = static_cast<std::size_t>(report.tokens);
  if (runs.size() != tokens * report.executed.size())
    throw InputError("Decoder: decisions need one place for each layer and token of the last call.");
  std::fill_n(const_cast<std::uint8_t*>(runs.data()), runs.size(), std::uint8_t{0});
  for (std::size_t layer = 0; layer < report.executed.size(); ++layer)
    for (const std::int32_t row : report.executed[layer])
      const_cast<std::uint8_t&>(runs[layer * tokens + static_cast<std::size_t>(row)]) = 1;
}

}  // namespace

void register_decoder(py::module_& module) {
  py::class_<Decoder>(module, "Decoder")
      .def(py::init(&make_decoder), py::arg("config"), py::arg("embedding"), py::arg("final_norm"), py::arg("head"),
           py::arg("layers"))
      .def("add_sequence", &Decoder::add_sequence)
      .def("remove_sequence", &Decoder::remove_sequence)
      .def("length", &Decoder::length)
      .def("truncate", &Decoder::truncate)
      .def("forward", &forward)
      .def("score", &score)
      .def("report", &report)
      .def("decisions", &decisions)
      .def("router_bytes", &Decoder::router_bytes)
      .def("kv_bytes", py::overload_cast<>(&Decoder::kv_bytes, py::const_))
      .def("kv_bytes",
           [](const Decoder& d, const std::vector<std::int64_t>& sequences) { return d.kv_bytes(sequences); })
      .def("set_theta", &Decoder::set_theta)
      .def("set_forced_tokens", &Decoder::set_forced_tokens)
      .def("set_depth", &Decoder::set_depth)
      .def("set_num_threads", &Decoder::set_num_threads);
}

}  // namespace qtale::bindings

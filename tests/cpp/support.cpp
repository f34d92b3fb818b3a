#include "support.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "catch.h"
#include "core/half.h"
#include "qtale/error.h"

namespace qtale::test {

std::string name_of(Compute compute) {
  switch (compute) {
    case Compute::int8: return "int8";
    case Compute::int16: return "int16";
    case Compute::bfloat16: return "bfloat16";
    default: return "float";
  }
}

Floats::Floats(DType dtype, std::int64_t size)
    : dtype_(dtype), size_(size), bytes_(static_cast<std::size_t>(size * size_of(dtype))) {}

std::uint32_t Floats::bits(std::int64_t i) const {
  std::uint32_t out = 0;
  const std::int64_t item = size_of(dtype_);
  std::memcpy(&out, bytes_.data() + i * item, static_cast<std::size_t>(item));
  return out;
}

float Floats::get(std::int64_t i) const {
  if (dtype_ == DType::f16) return f16_to_float(static_cast<std::uint16_t>(bits(i)));
  if (dtype_ == DType::bf16) return bf16_to_float(static_cast<std::uint16_t>(bits(i)));
  return std::bit_cast<float>(bits(i));
}

void Floats::set(std::int64_t i, float value) {
  std::uint32_t raw = std::bit_cast<std::uint32_t>(value);
  if (dtype_ == DType::f16) raw = float_to_f16(value);
  if (dtype_ == DType::bf16) raw = float_to_bf16(value);
  const std::int64_t item = size_of(dtype_);
  std::memcpy(bytes_.data() + i * item, &raw, static_cast<std::size_t>(item));
}

TensorView Floats::matrix(std::int64_t rows, std::int64_t cols) const {
  return TensorView::matrix(const_cast<std::uint8_t*>(bytes_.data()), dtype_, rows, cols);
}

TensorView Floats::vector() const {
  return TensorView::vector(const_cast<std::uint8_t*>(bytes_.data()), dtype_, size_);
}

Floats normal_floats(Random& random, DType dtype, std::int64_t size, float sigma) {
  Floats out(dtype, size);
  for (std::int64_t i = 0; i < size; ++i) out.set(i, sigma * random.normal());
  return out;
}

std::int64_t first_difference(const Floats& a, const Floats& b) {
  for (std::int64_t i = 0; i < a.size(); ++i)
    if (a.bits(i) != b.bits(i) && !(std::isnan(a.get(i)) && std::isnan(b.get(i)))) return i;
  return -1;
}

std::string Shape::text() const {
  return std::to_string(n) + "x" + std::to_string(k) + ", " + std::to_string(groups) + " groups, " +
         std::to_string(bits) + " bits, " + (symmetric ? "symmetric, " : "asymmetric, ") +
         std::string(name_of(scale_dtype)) + " scales";
}

Weight Weight::top(std::int64_t n) const {
  const std::int64_t params = n * shape.groups;
  Weight out{shape, {codes.begin(), codes.begin() + n * shape.k}, Floats(shape.scale_dtype, params), {}};
  out.shape.n = n;
  for (std::int64_t i = 0; i < params; ++i) out.scale.set(i, scale.get(i));
  if (!zero.empty()) out.zero.assign(zero.begin(), zero.begin() + params);
  return out;
}

Weight random_weight(Random& random, const Shape& shape) {
  const int half = 1 << (shape.bits - 1);
  const std::int64_t params = shape.n * shape.groups;
  Weight out{shape, std::vector<std::int8_t>(shape.n * shape.k), Floats(shape.scale_dtype, params), {}};
  for (auto& code : out.codes) code = static_cast<std::int8_t>(random.integer(-half, half - 1));
  for (std::int64_t i = 0; i < params; ++i) out.scale.set(i, random.uniform(0.5f, 2.0f) / (16.0f * half));
  if (!shape.symmetric) {
    out.zero.resize(params);
    for (auto& zero : out.zero) zero = static_cast<std::int8_t>(random.integer(-half, half - 1));
  }
  return out;
}

Weight quantized(const Floats& weight, const Shape& shape) {
  const std::int64_t params = shape.n * shape.groups;
  Weight out{shape, std::vector<std::int8_t>(shape.n * shape.k), Floats(shape.scale_dtype, params), {}};
  if (!shape.symmetric) out.zero.resize(params);
  const TensorView zero = view(out.zero, shape.n, shape.groups);
  quantize(weight.matrix(shape.n, shape.k), shape.bits, view(out.codes, shape.n, shape.k),
           out.scale.matrix(shape.n, shape.groups), shape.symmetric ? nullptr : &zero);
  return out;
}

Panels make_panels(const Weight& w, int panel_rows) {
  const Shape& s = w.shape;
  Panels out{cpu::make_layout(panel_rows, s.bits, s.n, s.k, s.groups, s.symmetric, s.scale_dtype), {}};
  out.bytes.resize(static_cast<std::size_t>(out.layout.panels * out.layout.panel_bytes));
  cpu::fill_panels(out.layout, w.codes.data(), w.scale.data(), w.zeros(), 0, out.layout.panels, out.bytes.data());
  return out;
}

std::vector<std::uint8_t> prepacked(const Weight& w) {
  const Shape& s = w.shape;
  auto codes = w.codes;
  auto zeros = w.zero;
  const TensorView zero = view(zeros, s.n, s.groups);
  std::vector<std::uint8_t> out(
      static_cast<std::size_t>(prepacked_bytes({s.n, s.k, s.groups, s.bits, s.symmetric, s.scale_dtype})));
  prepack(view(codes, s.n, s.k), w.scale.matrix(s.n, s.groups), s.symmetric ? nullptr : &zero, s.bits, view(out));
  return out;
}

TensorView view(std::vector<std::int8_t>& codes, std::int64_t rows, std::int64_t cols) {
  return TensorView::matrix(codes.data(), DType::s8, rows, cols);
}

TensorView view(std::vector<std::uint8_t>& bytes) {
  return TensorView::vector(bytes.data(), DType::u8, static_cast<std::int64_t>(bytes.size()));
}

bool has_amx() {
  const auto isas = cpu_isas();
  if (std::find(isas.begin(), isas.end(), "avx512_amx") != isas.end()) return true;
  WARN("skipped: this CPU or its system has no AMX");
  return false;
}

std::string input_error_of(const std::function<void()>& fn) {
  try {
    fn();
  } catch (const InputError& error) {
    return error.what();
  }
  return "";
}

}  // namespace qtale::test

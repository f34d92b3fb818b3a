#include "solve/check.h"

#include <atomic>
#include <cmath>
#include <vector>

#include "core/scalar.h"
#include "core/text.h"
#include "qtale/parallel.h"

namespace qtale::solve {

void check_finite(std::string_view op, std::string_view name, const TensorView& t) {
  constexpr std::int64_t kGrain = 65536;
  constexpr std::uint32_t kExponent = 0x7f800000u;
  std::atomic<std::int64_t> bad{-1};
  const std::int64_t columns = t.shape[1];
  parallel_for(t.shape[0], kGrain / (columns + 1) + 1, [&](std::int64_t begin, std::int64_t end) {
    for (; begin < end; ++begin) {
      const auto* row = t.as<const std::uint32_t>() + begin * t.strides[0];
      std::uint32_t count = 0;  // of exponents all ones
      for (std::int64_t i = 0; i < columns; ++i) count += (row[i] & kExponent) == kExponent;
      if (count > 0) bad = begin;
    }
  });
  if (bad >= 0) fail_input("{}: row {} of {} holds NaN or infinity; repair the values.", op, bad.load(), name);
}

void check_square(std::string_view op, std::string_view name, const TensorView& t, std::int64_t n) {
  ops::check_matrix(op, name, t, DType::f32);
  if (t.shape[0] != n || t.shape[1] != n)
    fail_input("{}: {} has shape {}; expected [{}, {}].", op, name, ops::shape_text(t), n, n);
  check_finite(op, name, t);
}

const std::int32_t* check_order(std::string_view op, const TensorView* order, std::int64_t n) {
  if (order == nullptr) return nullptr;
  ops::check_vector(op, "order", *order, DType::s32, n);
  std::vector<bool> seen(static_cast<std::size_t>(n));
  const auto* data = order->as<const std::int32_t>();
  for (std::int64_t i = 0; i < n; ++i) {
    if (data[i] < 0 || data[i] >= n || seen[static_cast<std::size_t>(data[i])])
      fail_input("{}: order[{}] is {}, which lies outside of 0 to {} or stands twice; pass a permutation.", op, i,
                 data[i], n - 1);
    seen[static_cast<std::size_t>(data[i])] = true;
  }
  return data;
}

void check_importance(std::string_view op, const TensorView& t, std::int64_t n) {
  ops::check_vector(op, "importance", t, DType::f32, n);
  for (std::int64_t i = 0; i < n; ++i)
    if (const float value = t.as<const float>()[i]; !(value >= 0.0f) || !std::isfinite(value))
      fail_input("{}: importance[{}] is {}; expected numbers that are not negative.", op, i, value);
}

cpu::SolveWeight check_weight(std::string_view op, const TensorView& weight, int num_bits, const TensorView& scale,
                              const TensorView* zero_point) {
  ops::check_bits(op, num_bits);
  ops::check_matrix(op, "weight", weight, DType::f32);
  const std::int64_t out = weight.shape[0], in = weight.shape[1];
  const std::int64_t groups = ops::check_params(op, out, in, scale, zero_point);
  check_finite(op, "weight", weight);
  return {weight.as<const float>(),
          weight.strides[0],
          out,
          in,
          groups,
          num_bits,
          scale.data,
          scale.dtype,
          zero_point ? zero_point->as<std::int8_t>() : nullptr};
}

void check_grids(std::string_view op, const cpu::SolveWeight& w) {
  const int half = 1 << (w.num_bits - 1);
  for (std::int64_t i = 0; i < w.rows * w.groups; ++i) {
    if (const float s = load_scalar(w.scale, w.scale_dtype, i); !std::isfinite(s) || !std::isfinite(1.0f / s))
      fail_input("{}: the scale of row {}, group {} is {}; expected a number that is not 0.", op, i / w.groups,
                 i % w.groups, s);
    if (const int zero = w.zero_point ? w.zero_point[i] : 0; zero < -half || zero >= half)
      fail_input("{}: zero_point {} does not fit {} bits; expected {} to {}.", op, zero, w.num_bits, -half, half - 1);
  }
}

std::int8_t* check_codes_out(std::string_view op, const TensorView& codes, const cpu::SolveWeight& weight) {
  ops::check_shape(op, "codes", codes, DType::s8, weight.rows, weight.columns);
  return codes.as<std::int8_t>();
}

cpu::GridRule check_search(std::string_view op, const ScaleSearch& search, int num_bits, bool symmetric,
                           DType scale_dtype) {
  constexpr int kMaxSteps = 10000;
  if (search.steps < 1 || search.steps > kMaxSteps)
    fail_input("{}: {} steps of the search; use 1 to {}.", op, search.steps, kMaxSteps);
  if (!(search.narrowest > 0.0f && search.narrowest <= search.widest && search.widest <= 2.0f))
    fail_input("{}: factors of ranges from {} down to {}; use numbers above 0 and up to 2.", op, search.widest,
               search.narrowest);
  if (search.signed_scales && !symmetric)
    fail_input("{}: signed scales mean nothing to grids with zero points; use them with symmetric ones.", op);
  return {num_bits, symmetric, scale_dtype, search.steps, search.widest, search.narrowest, search.signed_scales};
}

std::int64_t check_group_size(std::string_view op, std::int64_t group_size, std::int64_t in) {
  if (group_size < 0 || (group_size > 0 && in % group_size != 0))
    fail_input("{}: group_size {} does not divide {} columns; use a divisor, or 0.", op, group_size, in);
  return group_size > 0 ? group_size : in;
}

}  // namespace qtale::solve

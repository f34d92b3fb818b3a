#include "core/text.h"
#include "cpu/backend.h"
#include "ops/check.h"
#include "qtale/ops.h"

namespace qtale {
namespace {

constexpr std::int64_t kGroupUnit = 32;

void check_buffer(const char* op, const TensorView& buffer) {
  ops::check_dtype(op, "prepacked", buffer, DType::u8);
  ops::check_cpu(op, buffer);
  if (buffer.rank != 1) fail_input("{}: prepacked has shape {}; expected a vector.", op, ops::shape_text(buffer));
  ops::check_contiguous(op, "prepacked", buffer);
}

void check_info(const PrepackedInfo& info) {
  ops::check_bits("prepack", info.num_bits);
  const std::int64_t group = info.groups > 0 ? info.in_features / info.groups : 0;
  const bool divides = group > 0 && info.in_features % info.groups == 0 && group % kGroupUnit == 0;
  if (info.groups < 1 || (info.groups > 1 && !divides))
    fail_input("prepack: {} groups over {} inputs give a group_size of {}; use one group per row or a multiple of {}.",
               info.groups, info.in_features, group, kGroupUnit);
}

}  // namespace

std::int64_t prepacked_bytes(const PrepackedInfo& info) {
  check_info(info);
  return cpu::prepacked_bytes(info);
}

void prepack(const TensorView& codes, const TensorView& scale, const TensorView* zero_point, int num_bits,
             const TensorView& buffer) {
  constexpr auto op = "prepack";
  ops::check_dtype(op, "codes", codes, DType::s8);
  ops::check_matrix(op, "codes", codes);
  ops::check_contiguous(op, "codes", codes);
  ops::check_cpu(op, codes);
  const std::int64_t out = codes.shape[0], in = codes.shape[1];
  const std::int64_t groups = ops::check_params(op, out, in, scale, zero_point);
  const PrepackedInfo info{out, in, groups, num_bits, zero_point == nullptr, scale.dtype};
  check_buffer(op, buffer);
  const std::int64_t bytes = prepacked_bytes(info);
  if (buffer.shape[0] != bytes)
    fail_input("prepack: the buffer has {} bytes; this weight takes {}.", buffer.shape[0], bytes);
  ops::check_codes(op, codes, num_bits);
  // Kernels that take them off the codes have no room for more.
  if (zero_point != nullptr) ops::check_codes(op, *zero_point, num_bits, "zero point");
  cpu::prepack(info, codes.as<const std::int8_t>(), scale.data,
               zero_point ? zero_point->as<const std::int8_t>() : nullptr, buffer.as<std::uint8_t>());
}

PrepackedInfo prepacked_info(const TensorView& buffer) {
  check_buffer("prepacked_info", buffer);
  return cpu::prepacked_info(buffer.as<const std::uint8_t>(), buffer.shape[0]);
}

void unprepack(const TensorView& buffer, const TensorView& codes, const TensorView& scale,
               const TensorView* zero_point) {
  constexpr auto op = "unprepack";
  const PrepackedInfo info = prepacked_info(buffer);
  ops::check_shape(op, "codes", codes, DType::s8, info.out_features, info.in_features);
  ops::check_shape(op, "scale", scale, info.scale_dtype, info.out_features, info.groups);
  if ((zero_point == nullptr) != info.symmetric)
    fail_input("unprepack: the weight is {}symmetric, so it has {} zero points.", info.symmetric ? "" : "a",
               info.symmetric ? "no" : "its");
  if (zero_point != nullptr) {
    ops::check_shape(op, "zero_point", *zero_point, DType::s8, info.out_features, info.groups);
  }
  cpu::unprepack(buffer.as<const std::uint8_t>(), buffer.shape[0], codes.as<std::int8_t>(), scale.data,
                 zero_point ? zero_point->as<std::int8_t>() : nullptr);
}

}  // namespace qtale

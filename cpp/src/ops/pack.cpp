#include "cpu/backend.h"
#include "ops/check.h"
#include "qtale/ops.h"

namespace qtale {
namespace {

void check(const char* op, const TensorView& codes, int num_bits, const TensorView& packed) {
  ops::check_bits(op, num_bits);
  ops::check_dtype(op, "codes", codes, DType::s8);
  ops::check_matrix(op, "codes", codes);
  ops::check_contiguous(op, "codes", codes);
  ops::check_cpu(op, codes);
  ops::check_shape(op, "packed", packed, DType::s32, codes.shape[0], (codes.shape[1] * num_bits + 31) / 32);
}

}  // namespace

void pack(const TensorView& codes, int num_bits, const TensorView& packed) {
  check("pack", codes, num_bits, packed);
  ops::check_codes("pack", codes, num_bits);
  cpu::pack(codes.as<const std::int8_t>(), codes.shape[0], codes.shape[1], num_bits, packed.as<std::int32_t>());
}

void unpack(const TensorView& packed, int num_bits, const TensorView& codes) {
  check("unpack", codes, num_bits, packed);
  cpu::unpack(packed.as<const std::int32_t>(), codes.shape[0], codes.shape[1], num_bits, codes.as<std::int8_t>());
}

}  // namespace qtale

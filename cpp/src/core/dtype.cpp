#include "qtale/dtype.h"

namespace qtale {

std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::s8:
    case DType::u8: return 1;
    case DType::f16:
    case DType::bf16: return 2;
    case DType::f32:
    case DType::s32: return 4;
    case DType::s64:
    case DType::f64: return 8;
  }
  return 0;
}

std::string_view name_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::f16: return "float16";
    case DType::bf16: return "bfloat16";
    case DType::s8: return "int8";
    case DType::u8: return "uint8";
    case DType::s32: return "int32";
    case DType::s64: return "int64";
    case DType::f64: return "float64";
  }
  return "unknown";
}

}  // namespace qtale

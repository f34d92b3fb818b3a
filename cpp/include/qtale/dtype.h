#pragma once

#include <cstdint>
#include <string_view>

namespace qtale {

enum class DType : std::uint8_t { f32, f16, bf16, s8, u8, s32, s64, f64 };

std::int64_t size_of(DType dtype);
std::string_view name_of(DType dtype);

inline bool is_float(DType dtype) { return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16; }

}  // namespace qtale

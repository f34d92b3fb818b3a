#pragma once

#include "cpu/layout.h"

namespace qtale::cpu {

inline constexpr std::int64_t kHeaderBytes = 64;

struct Prepacked {
  Layout layout;
  const std::uint8_t* panels;
};

// Checks the header against the size of the buffer; throws InputError.
Prepacked open_prepacked(const std::uint8_t* buffer, std::int64_t bytes);

}  // namespace qtale::cpu

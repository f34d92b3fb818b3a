// Loops unrolled by the front end: indices are constants before the optimizer sees arrays of registers, so g++ 12 keeps
// them in registers instead of memory (a pragma unrolls too late for that).
#pragma once

#include <utility>

#define QTALE_INLINE __attribute__((always_inline)) inline
#define QTALE_INLINE_LAMBDA __attribute__((always_inline))

namespace qtale::cpu {
namespace {

// fn(std::integral_constant<int, 0>), fn(<1>), ... fn(<N - 1>)
template <int N, class Fn>
QTALE_INLINE void unroll(Fn&& fn) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      QTALE_INLINE_LAMBDA { (fn(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

}  // namespace
}  // namespace qtale::cpu

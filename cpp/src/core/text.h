// fmt behind one name, so that error sentences are built the same way everywhere.
#pragma once

#include <fmt/format.h>

#include <utility>

#include "qtale/error.h"

namespace qtale {

template <class... Args>
[[noreturn]] void fail_input(fmt::format_string<Args...> format, Args&&... args) {
  throw InputError(fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace qtale

// Catch2 of either major version: Debian 12 ships 2.13, CMake's download is 3.
#pragma once

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif

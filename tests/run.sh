#!/usr/bin/env bash
# Sets up and runs every test: the extension, Catch2 (plain and under sanitizers), pytest and the notebook.
# Needs Python 3.10+, a C++20 compiler and pip's index; works in build/, asks for nothing and changes nothing else.
# QTALE_DATA names a folder of task data; tests that need it skip without it.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\n== %s\n' "$1"; }

venv=build/test-venv
step "environment in $venv"
mkdir -p build
if ! "${PYTHON:-python3}" -m venv "$venv"; then
  echo "tests/run.sh: this Python cannot make virtual environments; install its venv module (Debian: python3-venv)." >&2
  exit 1
fi
PATH=$PWD/$venv/bin:$PATH
python -m pip install --quiet --upgrade pip
python -m pip install --quiet '.[test,notebooks]' cmake ninja -c constraints.txt
python -m qtale.doctor

# CMake takes an installed Catch2 first and downloads it otherwise.
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && [ ! -e /usr/include/catch2 ]; then
  step "Catch2 from the system's packages"
  apt-get update -qq && apt-get install -y -qq catch2 || echo "no package to be had; CMake downloads Catch2"
fi

prefix=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/cmeel.prefix
python -m pip install --quiet 'cmeel-fmt>=10' || true  # a download by CMake stands in for it
cpp_tests() {  # name, CMake options
  step "C++ tests, $1"
  cmake -S . -B "build/$1" -G Ninja -DQTALE_TESTS=ON -DCMAKE_PREFIX_PATH="$prefix" "${@:2}" >/dev/null
  cmake --build "build/$1" -- --quiet
  local log=build/$1/ctest.log
  if ! ctest --test-dir "build/$1" --output-on-failure -j 2 >"$log"; then
    grep -v ' Passed ' "$log"
    return 1
  fi
  tail -n 3 "$log"
}
cpp_tests release -DQTALE_WERROR=ON
# Instrumented standard headers set off warnings of their own, so these stay warnings here.
cpp_tests sanitized -DQTALE_SANITIZE=ON -DCMAKE_CXX_FLAGS_RELEASE='-O1 -g1'

step "Python tests"
python -m pytest -q tests/python

step "notebook"
python -m pytest -q --nbmake --nbmake-timeout=900 notebooks

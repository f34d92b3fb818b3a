// What the tests share: seeded data in every dtype, weights with their parameters, panels, scopes of settings.
#pragma once

#include <cstdint>
#include <functional>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "qtale/ops.h"
#include "qtale/parallel.h"

namespace qtale::test {

inline constexpr DType kFloatTypes[] = {DType::f32, DType::f16, DType::bf16};
inline constexpr int kBits[] = {2, 3, 4, 8};

// Heap blocks of exact size, so that AddressSanitizer sees every overrun, and on a cache line, as streaming stores
// want.
template <class T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <class U>
  explicit LineAllocator(const LineAllocator<U>&) {}
  T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* p, std::size_t) { ::operator delete(p, std::align_val_t{64}); }
  bool operator==(const LineAllocator&) const = default;
};
template <class T>
using Lines = std::vector<T, LineAllocator<T>>;

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  float normal() { return normal_(engine_); }
  float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(engine_); }
  int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine_); }
  std::uint32_t word() { return static_cast<std::uint32_t>(engine_()); }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<float> normal_;
};

// A vector of f32, f16 or bf16.
class Floats {
 public:
  Floats(DType dtype, std::int64_t size);
  DType dtype() const { return dtype_; }
  std::int64_t size() const { return size_; }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  float get(std::int64_t i) const;
  void set(std::int64_t i, float value);
  // Storage as an integer, for comparisons bit for bit.
  std::uint32_t bits(std::int64_t i) const;
  TensorView matrix(std::int64_t rows, std::int64_t cols) const;
  TensorView vector() const;

 private:
  DType dtype_;
  std::int64_t size_;
  Lines<std::uint8_t> bytes_;
};

std::string name_of(Compute compute);  // as users write it

Floats normal_floats(Random& random, DType dtype, std::int64_t size, float sigma = 1.0f);
// Index of the first element that differs, or -1; two NaN are equal.
std::int64_t first_difference(const Floats& a, const Floats& b);

struct Shape {
  std::int64_t n, k, groups;
  int bits;
  bool symmetric;
  DType scale_dtype;
  std::string text() const;
};

// Codes and parameters of a weight: (code - zero) * scale.
struct Weight {
  Shape shape;
  std::vector<std::int8_t> codes;
  Floats scale;
  std::vector<std::int8_t> zero;  // empty if symmetric

  int level(std::int64_t n, std::int64_t k) const { return codes[n * shape.k + k] - zero_of(n, k); }
  int zero_of(std::int64_t n, std::int64_t k) const { return zero.empty() ? 0 : zero[param(n, k)]; }
  float scale_of(std::int64_t n, std::int64_t k) const { return scale.get(param(n, k)); }
  double value(std::int64_t n, std::int64_t k) const { return double{scale_of(n, k)} * level(n, k); }
  std::int64_t param(std::int64_t n, std::int64_t k) const { return n * shape.groups + k / (shape.k / shape.groups); }
  const std::int8_t* zeros() const { return zero.empty() ? nullptr : zero.data(); }
  // The first n rows.
  Weight top(std::int64_t n) const;
};

Weight random_weight(Random& random, const Shape& shape);
// RTN by the operator under test.
Weight quantized(const Floats& weight, const Shape& shape);

// A weight in panels of any height.
struct Panels {
  cpu::Layout layout;
  std::vector<std::uint8_t> bytes;
};
Panels make_panels(const Weight& weight, int panel_rows);
std::vector<std::uint8_t> prepacked(const Weight& weight);

TensorView view(std::vector<std::int8_t>& codes, std::int64_t rows, std::int64_t cols);
TensorView view(std::vector<std::uint8_t>& bytes);

// Whether this CPU has the tier; warns that a test is skipped where it has not.
bool has_amx();

// Switches the instruction set for one scope.
class IsaScope {
 public:
  explicit IsaScope(const std::string& name) : before_(cpu_isa()) { set_cpu_isa(name); }
  ~IsaScope() { set_cpu_isa(before_); }
  IsaScope(const IsaScope&) = delete;
  IsaScope& operator=(const IsaScope&) = delete;

 private:
  std::string before_;
};

class ThreadScope {
 public:
  explicit ThreadScope(int count) : before_(num_threads()) { set_num_threads(count); }
  ~ThreadScope() { set_num_threads(before_); }
  ThreadScope(const ThreadScope&) = delete;
  ThreadScope& operator=(const ThreadScope&) = delete;

 private:
  int before_;
};

// The message of the InputError that fn throws; "" where it throws none.
std::string input_error_of(const std::function<void()>& fn);

}  // namespace qtale::test

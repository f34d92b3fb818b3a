// Caches, queries and float64 results for the tests of attention.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "qtale/decoder_ops.h"
#include "support.h"

namespace qtale::test {

inline constexpr Compute kComputes[] = {Compute::floating, Compute::int16, Compute::int8};

// Numbers times the Hadamard matrix of Sylvester, over sqrt(count).
std::vector<double> rotated(std::span<const float> x);

// One sequence: keys and values as the cache holds them, and its pages.
struct Cache {
  std::int64_t entries, kv_heads, head_dim;
  DType dtype;
  std::vector<float> k, v;  // [entries, kv_heads, head_dim] after rounding to dtype, those of s8 turned back
  std::vector<Lines<std::uint8_t>> memory;
  std::vector<void*> pages;

  // Pages hold NaN wherever no entry was stored.
  Cache(std::int64_t entries, std::int64_t kv_heads, std::int64_t head_dim, DType dtype);
  void append(std::vector<float> keys, std::vector<float> values, std::int64_t first);
  void fill(Random& random, float sigma = 1.0f);
  float key(std::int64_t entry, std::int64_t head, std::int64_t d) const {
    return k[static_cast<std::size_t>((entry * kv_heads + head) * head_dim + d)];
  }
  float value(std::int64_t entry, std::int64_t head, std::int64_t d) const {
    return v[static_cast<std::size_t>((entry * kv_heads + head) * head_dim + d)];
  }
};

// Queries of all runs and what each row sees.
struct Attending {
  std::int64_t heads, head_dim;
  float scale;
  std::vector<float> q;
  std::vector<std::int32_t> begin, end;
  std::vector<AttentionRun> runs;
  std::vector<const Cache*> caches;  // of each run
  Compute compute = Compute::floating;

  std::int64_t rows() const { return static_cast<std::int64_t>(begin.size()); }
  // Rows that see the entries [begin, end) of a cache; both move on by `step` with every row.
  void add(Random& random, const Cache& cache, std::int64_t rows, std::int64_t begin, std::int64_t end,
           std::int64_t step);
  std::vector<float> run() const;
};

// Largest |out - exact| over the bound of decoder_ops.h.
double worst_share(const Attending& a, const std::vector<float>& out);

// Shapes of a call: causal rows at the end of a cache.
struct Case {
  std::int64_t heads, kv_heads, head_dim, rows, entries, window;  // window 0: all
};
void add_causal(Attending& a, Random& random, const Cache& cache, std::int64_t rows, std::int64_t window);
std::string text(const Case& c, DType dtype, Compute compute, const std::string& isa);

// Numbers that have other bits.
std::int64_t differences(const float* a, const float* b, std::int64_t count);
// Runs of two caches, with and without a window, of one row and of rows that see nothing.
Attending ragged_batch(Random& random, const Cache& first, const Cache& second, std::int64_t heads);
// Numbers of a batch whose bits differ with three threads from those with one, and rows whose bits differ alone.
std::int64_t different_together(const Attending& batch);
// Rows of a batch whose bits differ when they attend alone.
std::int64_t different_alone(const Attending& batch, const std::vector<float>& expected);

}  // namespace qtale::test

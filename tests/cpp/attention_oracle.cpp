#include "attention_oracle.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "core/half.h"
#include "qtale/device.h"

namespace qtale::test {
namespace {

TensorView cube(const std::vector<float>& data, std::int64_t rows, std::int64_t heads, std::int64_t n) {
  return {const_cast<float*>(data.data()), DType::f32, 3, {rows, heads, n}, {heads * n, n, 1}, {}};
}

// Makes a key or query what it is beside keys of 8 bits, by another way than the operator's.
void round_to_codes(float* key, std::int64_t head_dim) {
  const std::vector<double> turned = rotated({key, static_cast<std::size_t>(head_dim)});
  double largest = 0.0;
  for (const double x : turned) largest = std::max(largest, std::fabs(x));
  std::vector<float> codes(turned.size());
  for (std::size_t i = 0; i < codes.size() && largest > 0.0; ++i)
    codes[i] = static_cast<float>(std::nearbyint(turned[i] * 127.0 / largest));
  const std::vector<double> back = rotated(codes);  // the matrix is its own inverse
  for (std::size_t i = 0; i < back.size(); ++i) key[i] = static_cast<float>(back[i] * largest / 127.0);
}

}  // namespace

std::vector<double> rotated(std::span<const float> x) {
  std::vector<double> out(x.size());
  for (std::size_t row = 0; row < x.size(); ++row) {
    for (std::size_t i = 0; i < x.size(); ++i) out[row] += std::popcount(row & i) % 2 == 0 ? x[i] : -double{x[i]};
    out[row] /= std::sqrt(static_cast<double>(x.size()));
  }
  return out;
}

Cache::Cache(std::int64_t entries_, std::int64_t kv_heads_, std::int64_t head_dim_, DType dtype_)
    : entries(entries_), kv_heads(kv_heads_), head_dim(head_dim_), dtype(dtype_) {
  const auto bytes = static_cast<std::size_t>(kv_page_bytes(kv_heads, head_dim, dtype));
  for (std::int64_t page = 0; page * kPageTokens < entries; ++page) memory.emplace_back(bytes, std::uint8_t{0xff});
  for (auto& page : memory) pages.push_back(page.data());
  k.resize(static_cast<std::size_t>(entries * kv_heads * head_dim));
  v.resize(k.size());
}

void Cache::append(std::vector<float> keys, std::vector<float> values, std::int64_t first) {
  const std::int64_t rows = static_cast<std::int64_t>(keys.size()) / (kv_heads * head_dim);
  kv_append(cube(keys, rows, kv_heads, head_dim), cube(values, rows, kv_heads, head_dim), pages, first, dtype);
  const auto stored = [&](float x) { return dtype == DType::f32 ? x : f16_to_float(float_to_f16(x)); };
  if (dtype == DType::s8) {
    for (std::int64_t i = 0; i < rows * kv_heads; ++i) round_to_codes(keys.data() + i * head_dim, head_dim);
    std::copy(keys.begin(), keys.end(), k.begin() + first * kv_heads * head_dim);
  } else {
    std::transform(keys.begin(), keys.end(), k.begin() + first * kv_heads * head_dim, stored);
  }
  std::transform(values.begin(), values.end(), v.begin() + first * kv_heads * head_dim, stored);
}

void Cache::fill(Random& random, float sigma) {
  std::vector<float> keys(k.size()), values(v.size());
  for (float& x : keys) x = sigma * random.normal();
  for (float& x : values) x = sigma * random.normal();
  append(keys, values, 0);
}

void Attending::add(Random& random, const Cache& cache, std::int64_t rows, std::int64_t first, std::int64_t last,
                    std::int64_t step) {
  const std::int64_t row = this->rows();
  for (std::int64_t r = 0; r < rows; ++r) {
    begin.push_back(static_cast<std::int32_t>(std::max<std::int64_t>(0, first + r * step)));
    end.push_back(static_cast<std::int32_t>(last + r * step));
  }
  for (std::int64_t i = 0; i < rows * heads * head_dim; ++i) q.push_back(random.normal());
  runs.push_back({row, rows, cache.pages});
  caches.push_back(&cache);
}

std::vector<float> Attending::run() const {
  std::vector<float> out(q.size(), -7.0f);
  const auto vector = [&](const std::vector<std::int32_t>& data) {
    return TensorView::vector(const_cast<std::int32_t*>(data.data()), DType::s32, rows());
  };
  const Cache& cache = *caches.front();
  attention(cube(q, rows(), heads, head_dim), runs, vector(begin), vector(end), cache.kv_heads, cache.dtype, scale,
            cube(out, rows(), heads, head_dim), compute);
  return out;
}

namespace {

// Whether queries, keys, weights and values are coded by integers of 16 bits.
bool is_coded(const Attending& a, const Cache& c) {
  return cpu_isa() == "avx2" && rounds_to_bfloat16(a.compute) && a.head_dim % 8 == 0 && c.dtype != DType::s8;
}

// What rounding adds to the error, as a share of the largest value. Scores of 8-bit keys are exact: the query that they
// are compared with is rounded alike, but for codes that are halfway between two. `moved`: what codes add to a score.
double rounding_share(const Attending& a, const Cache& c, double reach, double moved) {
  if (c.dtype == DType::s8) return 0x1p-8 * 1.5;
  if (is_coded(a, c)) return 0x1p-9 * 1.25 + std::expm1(2.0 * moved);
  return rounds_to_bfloat16(a.compute) ? 0x1p-8 * (1.25 + 1.125 * reach) : 0.0;
}

// The share of one head of a row.
double head_share(const Attending& a, const Cache& c, std::int64_t row, std::int64_t head, const float* out) {
  const std::int64_t kv = head / (a.heads / c.kv_heads), begin = a.begin[row], end = a.end[row];
  std::vector<float> q(a.q.begin() + (row * a.heads + head) * a.head_dim,
                       a.q.begin() + (row * a.heads + head + 1) * a.head_dim);
  if (c.dtype == DType::s8) round_to_codes(q.data(), a.head_dim);
  std::vector<double> weights;
  double top = -INFINITY, total = 0.0, reach = 0.0, largest = 0.0, moved = 0.0;
  for (std::int64_t j = begin; j < end; ++j) {
    double dot = 0.0, sum = 0.0, most_q = 0.0, most_k = 0.0, sum_q = 0.0, sum_k = 0.0;
    for (std::int64_t d = 0; d < a.head_dim; ++d) {
      const double query = std::fabs(q[static_cast<std::size_t>(d)]), key = std::fabs(c.key(j, kv, d));
      most_q = std::max(most_q, query), most_k = std::max(most_k, key);
      sum_q += query, sum_k += key;
      const double product = double{a.scale} * q[static_cast<std::size_t>(d)] * c.key(j, kv, d);
      dot += product;
      sum += std::fabs(product);
    }
    weights.push_back(dot);
    top = std::max(top, dot);
    reach = std::max(reach, sum);
    moved = std::max(moved, a.scale * (most_q * sum_k / 4000.0 + most_k * sum_q / 8000.0));
  }
  for (double& weight : weights) total += weight = std::exp(weight - top);
  std::vector<double> exact(static_cast<std::size_t>(a.head_dim));
  for (std::int64_t j = begin; j < end; ++j) {
    for (std::int64_t d = 0; d < a.head_dim; ++d) {
      exact[d] += weights[j - begin] / total * c.value(j, kv, d);
      largest = std::max(largest, std::fabs(double{c.value(j, kv, d)}));
    }
  }
  const double entries = static_cast<double>(std::max<std::int64_t>(0, end - begin));
  const double rounding = rounding_share(a, c, reach, moved);
  const double bound =
      largest * (0x1p-24 * (static_cast<double>(a.head_dim) + entries + 64) * (1 + 2 * reach) + rounding);
  double worst = 0.0;
  for (std::int64_t d = 0; d < a.head_dim; ++d) {
    const double error = std::fabs(out[d] - exact[d]);
    if (!(error <= 0.0)) worst = std::max(worst, std::isnan(error) || bound == 0.0 ? INFINITY : error / bound);
  }
  return worst;
}

}  // namespace

double worst_share(const Attending& a, const std::vector<float>& out) {
  double worst = 0.0;
  for (std::size_t i = 0; i < a.runs.size(); ++i)
    for (std::int64_t row = a.runs[i].row; row < a.runs[i].row + a.runs[i].rows; ++row)
      for (std::int64_t head = 0; head < a.heads; ++head)
        worst =
            std::max(worst, head_share(a, *a.caches[i], row, head, out.data() + (row * a.heads + head) * a.head_dim));
  return worst;
}

void add_causal(Attending& a, Random& random, const Cache& cache, std::int64_t rows, std::int64_t window) {
  const std::int64_t end = cache.entries - rows + 1;
  a.add(random, cache, rows, window > 0 ? end - window : -cache.entries, end, 1);
}

std::string text(const Case& c, DType dtype, Compute compute, const std::string& isa) {
  return isa + " " + name_of(compute) + " " + std::string(name_of(dtype)) + ": " + std::to_string(c.heads) + "/" +
         std::to_string(c.kv_heads) + " heads of " + std::to_string(c.head_dim) + ", " + std::to_string(c.rows) +
         " rows at " + std::to_string(c.entries) + ", window " + std::to_string(c.window);
}

std::int64_t differences(const float* a, const float* b, std::int64_t count) {
  std::int64_t found = 0;
  for (std::int64_t i = 0; i < count; ++i) found += std::memcmp(a + i, b + i, sizeof(float)) != 0;
  return found;
}

std::int64_t different_alone(const Attending& batch, const std::vector<float>& expected) {
  const std::int64_t size = batch.heads * batch.head_dim;
  std::int64_t different = 0;
  for (const AttentionRun& run : batch.runs) {
    for (std::int64_t row = run.row; row < run.row + run.rows; ++row) {
      Attending single = batch;
      single.runs = {{0, 1, run.pages}};
      single.q.assign(batch.q.begin() + row * size, batch.q.begin() + (row + 1) * size);
      single.begin = {batch.begin[row]};
      single.end = {batch.end[row]};
      different += differences(single.run().data(), expected.data() + row * size, size) != 0;
    }
  }
  return different;
}

Attending ragged_batch(Random& random, const Cache& first, const Cache& second, std::int64_t heads) {
  constexpr std::int64_t kRows = 45;
  Attending batch{heads, first.head_dim, 0.125f, {}, {}, {}, {}, {}};
  add_causal(batch, random, first, kRows, 0);
  batch.add(random, second, 1, 0, second.entries, 0);
  add_causal(batch, random, first, kRows, 650);
  batch.add(random, second, 3, 5, 5, 0);
  return batch;
}

std::int64_t different_together(const Attending& batch) {
  std::vector<float> expected;
  {
    const ThreadScope one(1);
    expected = batch.run();
  }
  const ThreadScope threads(3);
  const std::vector<float> again = batch.run();
  return differences(expected.data(), again.data(), static_cast<std::int64_t>(expected.size())) +
         different_alone(batch, expected);
}

}  // namespace qtale::test

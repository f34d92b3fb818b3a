// Jaccard coefficients of rows of indices over all threads.
#include <algorithm>
#include <vector>

#include "cpu/backend.h"
#include "cpu/isa.h"
#include "qtale/parallel.h"

namespace qtale::cpu {
namespace {

constexpr std::int64_t kGrain = 4096;  // indices worth a second thread

std::int64_t sorted_set(const std::int32_t* from, std::int64_t size, std::int32_t* to) {
  std::copy_n(from, size, to);
  std::sort(to, to + size);
  return std::unique(to, to + size) - to;
}

}  // namespace

double jaccard_by_sorting(const std::int32_t* a, std::int64_t a_size, const std::int32_t* b, std::int64_t b_size,
                          std::int32_t* scratch) {
  std::int32_t* const right = scratch + a_size;
  const std::int64_t lefts = sorted_set(a, a_size, scratch), rights = sorted_set(b, b_size, right);
  std::int64_t common = 0;
  for (std::int64_t i = 0, j = 0; i < lefts && j < rights;) {
    const std::int32_t l = scratch[i], r = right[j];
    common += l == r;
    i += l <= r;
    j += r <= l;
  }
  const std::int64_t all = lefts + rights - common;
  return all == 0 ? 1.0 : static_cast<double>(common) / static_cast<double>(all);
}

void jaccard(const IndexRows& a, const IndexRows& b, std::int64_t rows, double* out) {
  const JaccardKernel kernel = kernels().jaccard;
  const std::int64_t size = a.size + b.size;
  parallel_for(rows, kGrain / std::max<std::int64_t>(1, size), [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::int32_t> scratch(static_cast<std::size_t>(size));
    for (; begin < end; ++begin)
      out[begin] = kernel(a.data + begin * a.stride, a.size, b.data + begin * b.stride, b.size, scratch.data());
  });
}

}  // namespace qtale::cpu

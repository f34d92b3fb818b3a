// kv_page_bytes, kv_append and attention.
#include <algorithm>

#include "core/text.h"
#include "cpu/decoder.h"
#include "cpu/isa.h"
#include "ops/check.h"
#include "qtale/device.h"

namespace qtale {
namespace {

using cpu::kMaxHeadDim;
constexpr std::int64_t kMinRotated = 16;  // dimensions that fill a register

void check_cache(std::string_view op, std::int64_t kv_heads, std::int64_t head_dim, DType dtype) {
  if (kv_heads < 1) fail_input("{}: {} KV heads are not possible; use at least 1.", op, kv_heads);
  if (head_dim < 2 || head_dim > kMaxHeadDim || head_dim % 2 != 0)
    fail_input("{}: head_dim {} is not supported; use an even number up to {}.", op, head_dim, kMaxHeadDim);
  if (dtype != DType::f16 && dtype != DType::f32 && dtype != DType::s8)
    fail_input("{}: a cache of {} is not supported; use float16, float32 or int8 keys.", op, name_of(dtype));
  if (dtype == DType::s8 && !has_int8_keys(head_dim))
    fail_input(
        "{}: keys of 8 bits need a CPU with AVX-512 BF16 and a head_dim that is a power of two from {} up, but the "
        "kernels in use are {} and head_dim is {}; use a cache of float16.",
        op, kMinRotated, cpu_isa(), head_dim);
}

// The pages of entries [begin, end) are there.
void check_pages(std::string_view op, std::span<void* const> pages, std::int64_t begin, std::int64_t end) {
  const auto held = static_cast<std::int64_t>(pages.size()) * kPageTokens;
  if (begin < 0 || end > held)
    fail_input("{}: entries {} to {} are not in the cache; its {} pages hold {}.", op, begin, end - 1, pages.size(),
               held);
  for (std::int64_t page = begin / kPageTokens; page * kPageTokens < end; ++page)
    if (pages[static_cast<std::size_t>(page)] == nullptr)
      fail_input("{}: page {} of the cache is a null pointer, but entries {} to {} need it.", op, page, begin, end - 1);
}

void check_run(const AttentionRun& run, std::int64_t from, std::int64_t rows, const std::int32_t* begin,
               const std::int32_t* end) {
  if (run.row < from || run.rows < 0 || run.rows > rows - run.row)
    fail_input(
        "attention: a run of {} rows from row {} does not fit; runs ascend without overlap within the {} rows of q.",
        run.rows, run.row, rows);
  std::int64_t first = INT64_MAX, last = 0;
  for (std::int64_t r = run.row; r < run.row + run.rows; ++r) {
    if (begin[r] >= end[r]) continue;
    first = std::min<std::int64_t>(first, begin[r]);
    last = std::max<std::int64_t>(last, end[r]);
  }
  if (last > 0) check_pages("attention", run.pages, first, last);
}

}  // namespace

bool has_int8_keys(std::int64_t head_dim) {
  const bool rotates = head_dim >= kMinRotated && head_dim <= kMaxHeadDim && (head_dim & (head_dim - 1)) == 0;
  return rotates && cpu::kernels().decoder->rounded.append_int8_keys != nullptr;
}

std::int64_t kv_page_bytes(std::int64_t kv_heads, std::int64_t head_dim, DType dtype) {
  check_cache("kv_page_bytes", kv_heads, head_dim, dtype);
  return kv_heads * cpu::kv_head_bytes(head_dim, dtype);
}

void kv_append(const TensorView& k, const TensorView& v, std::span<void* const> pages, std::int64_t first,
               DType dtype) {
  constexpr auto op = "kv_append";
  ops::check_heads(op, "k", k, 3);
  ops::check_heads(op, "v", v, 3);
  const std::int64_t rows = k.shape[0], kv_heads = k.shape[1], head_dim = k.shape[2];
  if (v.shape != k.shape)
    fail_input("kv_append: v has shape {}; expected that of k, {}.", ops::shape_text(v), ops::shape_text(k));
  check_cache(op, kv_heads, head_dim, dtype);
  if (rows == 0) return;
  if (first < 0) fail_input("kv_append: entry {} is no place to begin; use 0 or more.", first);
  check_pages(op, pages, first, first + rows);
  cpu::kv_append({{k.as<const float>(), k.strides[0], k.strides[1]},
                  {v.as<const float>(), v.strides[0], v.strides[1]},
                  rows,
                  kv_heads,
                  head_dim,
                  pages.data(),
                  first,
                  dtype});
}

void attention(const TensorView& q, std::span<const AttentionRun> runs, const TensorView& begin, const TensorView& end,
               std::int64_t kv_heads, DType dtype, float scale, const TensorView& out, Compute compute) {
  constexpr auto op = "attention";
  ops::check_heads(op, "q", q, 3);
  ops::check_heads(op, "out", out, 3);
  const std::int64_t rows = q.shape[0], heads = q.shape[1], head_dim = q.shape[2];
  if (out.shape != q.shape)
    fail_input("attention: out has shape {}; expected that of q, {}.", ops::shape_text(out), ops::shape_text(q));
  check_cache(op, kv_heads, head_dim, dtype);
  if (heads % kv_heads != 0)
    fail_input("attention: {} heads cannot share {} KV heads evenly; use a multiple.", heads, kv_heads);
  ops::check_vector(op, "begin", begin, DType::s32, rows);
  ops::check_vector(op, "end", end, DType::s32, rows);
  std::int64_t from = 0;
  for (const AttentionRun& run : runs) {
    check_run(run, from, rows, begin.as<const std::int32_t>(), end.as<const std::int32_t>());
    from = run.row + run.rows;
  }
  if (heads == 0) return;
  cpu::attention({{q.as<const float>(), q.strides[0], q.strides[1]},
                  {out.as<float>(), out.strides[0], out.strides[1]},
                  begin.as<const std::int32_t>(),
                  end.as<const std::int32_t>(),
                  heads / kv_heads,
                  head_dim,
                  dtype,
                  scale,
                  compute},
                 runs, kv_heads);
}

}  // namespace qtale

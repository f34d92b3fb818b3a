// Where kv_append puts what. Internal linkage, because files for newer CPUs include it.
#pragma once

#include "cpu/decoder.h"

namespace qtale::cpu {
namespace {

// Calls fn(the KV head's part of a page, slot in the page, row of k and v, head) for the entries of units [begin, end).
template <class Fn>
void for_entries(const AppendArgs& a, std::int64_t begin, std::int64_t end, Fn fn) {
  const std::int64_t head_bytes = kv_head_bytes(a.head_dim, a.dtype);
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t page = a.first / kPageTokens + unit / a.kv_heads, head = unit % a.kv_heads;
    auto* part = static_cast<std::byte*>(a.pages[page]) + head * head_bytes;
    const std::int64_t from = page * kPageTokens > a.first ? page * kPageTokens : a.first;
    const std::int64_t stop = a.first + a.rows, to = (page + 1) * kPageTokens < stop ? (page + 1) * kPageTokens : stop;
    for (std::int64_t entry = from; entry < to; ++entry) fn(part, entry % kPageTokens, entry - a.first, head);
  }
}

}  // namespace
}  // namespace qtale::cpu

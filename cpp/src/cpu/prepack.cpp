// Prepacked buffers: a header that says what follows, then the panels of layout.h.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "core/text.h"
#include "cpu/backend.h"
#include "cpu/isa.h"
#include "cpu/prepacked.h"
#include "qtale/parallel.h"

namespace qtale::cpu {
namespace {

constexpr char kMagic[8] = {'Q', 'T', 'A', 'L', 'E', 'P', 'K', '1'};
constexpr std::int64_t kMaxDim = std::int64_t{1} << 31;

struct Header {
  char magic[8];
  std::int32_t panel_rows;
  std::int32_t num_bits;
  std::int32_t symmetric;
  std::int32_t scale_dtype;
  std::int64_t n, k, groups;
  std::int64_t reserved[2];
};
static_assert(sizeof(Header) == kHeaderBytes);

Layout layout_of(const PrepackedInfo& info, int panel_rows) {
  return make_layout(panel_rows, info.num_bits, info.out_features, info.in_features, info.groups, info.symmetric,
                     info.scale_dtype);
}

bool plausible(const Header& h) {
  const bool bits = h.num_bits == 2 || h.num_bits == 3 || h.num_bits == 4 || h.num_bits == 8;
  const bool dims = h.n >= 0 && h.n < kMaxDim && h.k >= 0 && h.k < kMaxDim && h.groups >= 1 &&
                    (h.groups == 1 || (h.k >= h.groups && h.k % h.groups == 0 && h.k / h.groups % kPadK == 0));
  return bits && dims && (h.panel_rows == 16 || h.panel_rows == 64) && (h.symmetric == 0 || h.symmetric == 1) &&
         h.scale_dtype >= 0 && h.scale_dtype <= static_cast<std::int32_t>(DType::bf16);
}

// Decode streams the buffer from memory; 4 KiB pages cost a quarter of that bandwidth.
void ask_for_huge_pages(std::uint8_t* buffer, std::int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<std::uintptr_t>(buffer) + page - 1) / page * page;
  const auto end = (reinterpret_cast<std::uintptr_t>(buffer) + static_cast<std::uintptr_t>(bytes)) / page * page;
  constexpr std::uintptr_t kWorthwhile = std::uintptr_t{4} << 20;
  if (end > begin + kWorthwhile) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)buffer;
  (void)bytes;
#endif
}

}  // namespace

Prepacked open_prepacked(const std::uint8_t* buffer, std::int64_t bytes) {
  Header h;
  if (bytes < kHeaderBytes)
    fail_input("prepacked weight: {} bytes are too few for its header; make it with prepack.", bytes);
  std::memcpy(&h, buffer, sizeof h);
  if (std::memcmp(h.magic, kMagic, sizeof kMagic) != 0 || !plausible(h))
    fail_input("prepacked weight: the buffer does not begin with a valid header; make it with prepack.");
  const PrepackedInfo info{h.n, h.k, h.groups, h.num_bits, h.symmetric == 1, static_cast<DType>(h.scale_dtype)};
  const Layout layout = layout_of(info, h.panel_rows);
  const std::int64_t expected = kHeaderBytes + layout.panels * layout.panel_bytes;
  if (bytes != expected)
    fail_input("prepacked weight: {} bytes do not hold a [{}, {}] matrix of {} bits; expected {}.", bytes, h.n, h.k,
               h.num_bits, expected);
  return {layout, buffer + kHeaderBytes};
}

std::int64_t prepacked_bytes(const PrepackedInfo& info) {
  const Layout layout = layout_of(info, kernels().panel_rows);
  return kHeaderBytes + layout.panels * layout.panel_bytes;
}

void prepack(const PrepackedInfo& info, const std::int8_t* codes, const void* scale, const std::int8_t* zero_point,
             std::uint8_t* buffer) {
  const Layout layout = layout_of(info, kernels().panel_rows);
  ask_for_huge_pages(buffer, kHeaderBytes + layout.panels * layout.panel_bytes);
  Header h{};
  std::memcpy(h.magic, kMagic, sizeof kMagic);
  h.panel_rows = layout.panel_rows;
  h.num_bits = info.num_bits;
  h.symmetric = info.symmetric ? 1 : 0;
  h.scale_dtype = static_cast<std::int32_t>(info.scale_dtype);
  h.n = info.out_features;
  h.k = info.in_features;
  h.groups = info.groups;
  std::memcpy(buffer, &h, sizeof h);
  parallel_for(layout.panels, 1, [&](std::int64_t begin, std::int64_t end) {
    fill_panels(layout, codes, scale, zero_point, begin, end, buffer + kHeaderBytes);
  });
}

PrepackedInfo prepacked_info(const std::uint8_t* buffer, std::int64_t bytes) {
  const Layout layout = open_prepacked(buffer, bytes).layout;
  return {layout.n, layout.k, layout.groups, layout.num_bits, layout.symmetric, layout.scale_dtype};
}

void unprepack(const std::uint8_t* buffer, std::int64_t bytes, std::int8_t* codes, void* scale,
               std::int8_t* zero_point) {
  const Prepacked packed = open_prepacked(buffer, bytes);
  parallel_for(packed.layout.panels, 1, [&](std::int64_t begin, std::int64_t end) {
    read_panels(packed.layout, packed.panels, begin, end, codes, scale, zero_point);
  });
}

}  // namespace qtale::cpu

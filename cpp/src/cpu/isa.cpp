#include "cpu/isa.h"

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef QTALE_X86
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "core/text.h"
#include "qtale/device.h"

namespace qtale {
namespace cpu {
namespace {

#ifdef QTALE_X86
const KernelTable& avx512_bf16_table() {
  static const DecoderKernels decoder = [] {
    DecoderKernels same = avx512_decoder_table;
    same.rounded = avx512_bf16_rounded_table;
    return same;
  }();
  static const KernelTable table = [] {
    KernelTable same = avx512_table;
    same.name = "avx512_bf16";
    same.floating = avx512_bf16_float_table;
    same.bf16_project = &avx512_bf16_project_table;
    same.decoder = &decoder;
    return same;
  }();
  return table;
}

const KernelTable& avx512_amx_table() {
  static const DecoderKernels decoder = [] {
    DecoderKernels same = *avx512_bf16_table().decoder;
    same.rounded.attention = avx512_amx_attention_table;
    return same;
  }();
  static const KernelTable table = [] {
    KernelTable same = avx512_bf16_table();
    same.name = "avx512_amx";
    same.int8 = avx512_amx_int8_table;
    same.int16 = &avx512_amx_int16_table;
    same.floating = avx512_table.floating;  // CPUs with AMX have slow vdpbf16ps
    same.bf16_project = &avx512_amx_project_table;
    same.bf16_gram = &avx512_amx_gram_table;
    same.decoder = &decoder;
    same.tiles = true;
    return same;
  }();
  return table;
}

// Whether the CPU multiplies tiles of bytes and of bf16 numbers and the system grants this process their registers,
// which it hands out on demand alone. Asks for them.
bool claim_amx() {
#ifdef __linux__
  constexpr unsigned kTileBits = 3u << 24 | 1u << 22;  // AMX-TILE, AMX-INT8 and AMX-BF16
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTileBits) != kTileBits) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// The name in QTALE_CPU_ISA; empty: the best that there is.
std::string wanted_name() {
  const char* name = std::getenv("QTALE_CPU_ISA");
  return name == nullptr ? "" : name;
}

std::vector<const KernelTable*> find_tables() {
  std::vector<const KernelTable*> tables{&reference_table, &generic_table};
#ifdef QTALE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2) tables.push_back(&avx2_table);
  if (avx512) tables.push_back(&avx512_table);
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16) tables.push_back(&avx512_bf16_table());
  // The claim makes the system ask for larger stacks of signal handlers, so nobody gets it who wants other kernels.
  const std::string wanted = wanted_name();
  const bool amx = wanted.empty() || wanted == avx512_amx_table().name;
  if (bf16 && amx && claim_amx()) tables.push_back(&avx512_amx_table());
#endif
  return tables;
}

const KernelTable* find(const std::string& name) {
  const auto& tables = available_tables();
  const auto match = [&](const KernelTable* table) { return name == table->name; };
  const auto found = std::find_if(tables.begin(), tables.end(), match);
  if (found != tables.end()) return *found;
  std::string names;
  for (const KernelTable* table : tables) names += (names.empty() ? "" : ", ") + std::string(table->name);
  fail_input("QTALE_CPU_ISA: '{}' is not an instruction set this CPU and build can run; use one of {}.", name, names);
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table = [] {
    const std::string wanted = wanted_name();
    return wanted.empty() ? available_tables().back() : find(wanted);
  }();
  return table;
}

}  // namespace

const std::vector<const KernelTable*>& available_tables() {
  static const std::vector<const KernelTable*> tables = find_tables();
  return tables;
}

const KernelTable& kernels() { return *current(); }

}  // namespace cpu

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const cpu::KernelTable* table : cpu::available_tables()) names.emplace_back(table->name);
  return names;
}

std::string cpu_isa() { return cpu::kernels().name; }

bool has_bfloat16() { return cpu::kernels().bf16_project != nullptr; }

bool has_tiles() { return cpu::kernels().tiles; }

void set_cpu_isa(const std::string& name) { cpu::current() = cpu::find(name); }

}  // namespace qtale

#pragma once

#include <string>
#include <vector>

namespace qtale {

enum class DeviceType : unsigned char { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;
};

// Why this build has CUDA kernels or has none; answered by the linked backend, never by the preprocessor.
bool cuda_built();
std::string cuda_reason();

// Names of the instruction sets that this build has kernels for and this CPU can run, worst first.
std::vector<std::string> cpu_isas();
// The one in use: the best of them, or the one that QTALE_CPU_ISA names (InputError where the CPU lacks it).
std::string cpu_isa();
// Whether it multiplies bfloat16 numbers, as Compute::bfloat16 asks for.
bool has_bfloat16();
// Whether it multiplies many rows in tiles (AMX): qmatmul keeps codes of activations in a second form for them, and
// matmul in bfloat16 is faster with weights that lie in tiles.
bool has_tiles();
// For tests and benchmarks: switches the instruction set of the calling process.
void set_cpu_isa(const std::string& name);

}  // namespace qtale

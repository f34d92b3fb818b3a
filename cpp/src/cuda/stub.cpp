// Linked when the build has no CUDA kernels: callers ask, nobody needs a preprocessor.
#include "qtale/device.h"

namespace qtale {

bool cuda_built() { return false; }

std::string cuda_reason() { return "this version of qtale has kernels for the CPU only"; }

}  // namespace qtale

#pragma once

#include "qtale/engine.h"

namespace qtale::engine {

// InputError where the parts of a decoder do not fit each other.
void check_spec(const DecoderSpec& spec);

}  // namespace qtale::engine

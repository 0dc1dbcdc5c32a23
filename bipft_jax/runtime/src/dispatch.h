// The instruction sets that this processor has.
#pragma once

#include "kernels.h"

namespace bipft {

// The sets, the fastest first; null ends the list.
const Kernels* const* supported_kernels();

// The set of that name, or null if it is unknown or this processor lacks it; without a name, or
// with an empty one, the fastest.
const Kernels* kernels_named(const char* name);

}  // namespace bipft

// Where the operators' outputs live.
#pragma once

#include <c10/core/Allocator.h>

namespace bnext {

// The allocator for a CPU tensor of that size: torch's own for small ones, blocks of cpu/memory.h for large
// ones.
c10::Allocator* output_allocator(size_t bytes);

}  // namespace bnext

// Where the operators' outputs live.
//
// A loop that writes two tensors side by side takes up to six times as long where both lie at the same place
// in their pages, with an input just below it: each load waits for the stores to both (Zen 3: 7.3 instead
// of 1.3 ns an element, 1.2 to 1.9 times as long with the input elsewhere). So the second lies half a page
// further, where outputs are blocks of cpu/memory.h; torch's allocator puts small ones where it likes.
#pragma once

#include <c10/core/Allocator.h>

namespace bnext {

// Which of the outputs of its size an operator writes at once.
enum class Output : bool { first, second };

// The allocator for a CPU tensor of that size: torch's own for small ones, blocks of cpu/memory.h for large
// ones.
c10::Allocator* output_allocator(size_t bytes, Output which = Output::first);

}  // namespace bnext

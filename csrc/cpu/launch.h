// What the CPU engine offers to the tensor level.
#pragma once

#include "args.h"
#include "plan.h"

namespace bnext::cpu {

// Sizes of this machine's caches; `threads` is the caller's.
Machine machine(int threads);

void forward(const ForwardArgs& args, const Plan& plan);

// Null dx: no input gradient. Null dweight and dbias: no sums for them.
void backward(const BackwardArgs& args, const Plan& plan);

}  // namespace bnext::cpu

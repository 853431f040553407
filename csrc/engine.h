// What differs between devices, as the tensor level sees it: how memory is made, and who computes.
#pragma once

#include <ATen/core/Tensor.h>

#include "args.h"
#include "output_memory.h"
#include "plan.h"

namespace bnext {

// Raises where this build has no engine for the input's device. Asked before anything is allocated or
// written.
void require_engine(const at::Tensor& x);

// Uninitialised, on the device of `like`.
at::Tensor empty_vector(at::IntArrayRef sizes, at::ScalarType dtype, const at::Tensor& like);
at::Tensor empty_output(const at::Tensor& like, at::MemoryFormat format, Output which = Output::first);

// Plans and launches on the device of x. On a GPU that is its current stream, and nothing waits.
void run(const ForwardArgs& args, Pass pass, const at::Tensor& x);
void run(const BackwardArgs& args, Pass pass, const at::Tensor& x);

}  // namespace bnext

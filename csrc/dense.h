// A call's tensors to plain arguments and through an engine: what the whole operators and the single phases
// share. Checks come before.
#pragma once

#include "calls.h"
#include "plan.h"

namespace bnext {

// x in an order the kernels can walk, the order itself, and its extent.
struct Input {
  at::MemoryFormat format;
  at::Tensor dense;
  Extent extent;

  explicit Input(const at::Tensor& x);
};

// Into y, and the mask if it is wanted; returns stats. y may be the input.
at::Tensor run_forward(const ForwardCall& call, const Input& input, const at::Tensor& y,
                       const at::Tensor& mask);

// Outputs as call.output_mask wants them. sums_out, sums_in: see BackwardArgs.
BackwardResult run_backward(const BackwardCall& call, const Input& input, Pass pass, Sums* sums_out = nullptr,
                            const Sums* sums_in = nullptr);

}  // namespace bnext

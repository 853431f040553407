// Forward-mode derivatives: the tangents of what the operators return, from those of what they are given.
#pragma once

#include <torch/csrc/autograd/VariableTypeUtils.h>

#include "calls.h"

namespace bnext {

template <class... Tensors>
bool any_tangent(const Tensors&... tensors) {
  return (torch::autograd::isFwGradDefined(tensors) || ...);
}

// Of y, from the stats that it was normalised with.
at::Tensor forward_tangent(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                           const OptionalTensor& bias, const at::Tensor& stats, bool training,
                           const ActivationSpec& activation);

// Of every gradient that was asked for; undefined: none.
BackwardResult backward_tangents(const BackwardCall& call);

}  // namespace bnext

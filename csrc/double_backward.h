// The derivative of the backward operator, in torch operations that can be differentiated further.
#pragma once

#include <ATen/core/Tensor.h>

#include "args.h"

namespace bnext {

// Of backward's outputs; undefined or empty: none.
struct Cotangents {
  at::Tensor dx, dweight, dbias, dresidual;
};

// What backward was given, and the cotangents of that: undefined where there was none, of bias and residual
// also where backward does not depend on them.
struct BackwardInputs {
  at::Tensor dy, x, residual, mask, weight, bias, stats;
};

BackwardInputs double_backward(const Cotangents& to, const BackwardInputs& given, bool training,
                               const ActivationSpec& activation);

}  // namespace bnext

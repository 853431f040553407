// The derivative of the backward operator, in torch operations that can be differentiated further.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

#include "args.h"

namespace bnext {

// From the cotangents of dx, dweight and dbias (undefined or empty: none) to those of dy, x, weight and bias
// (undefined without one; that of bias also without an activation, which alone makes backward depend on it).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> double_backward(
    const std::array<at::Tensor, 3>& cotangents, const at::Tensor& dy, const at::Tensor& x,
    const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& stats, bool training,
    const ActivationSpec& activation);

}  // namespace bnext

// The derivative of the backward operator, in torch operations that can be differentiated further.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

namespace bnext {

// From the cotangents of dx, dweight and dbias (undefined or empty: none) to those of dy, x and weight
// (undefined without one).
std::tuple<at::Tensor, at::Tensor, at::Tensor> double_backward(const std::array<at::Tensor, 3>& cotangents,
                                                               const at::Tensor& dy, const at::Tensor& x,
                                                               const at::Tensor& weight,
                                                               const at::Tensor& stats, bool training);

}  // namespace bnext

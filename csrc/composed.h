// The layer in torch operations, for derivatives that the kernels have no formula for: of any order, with
// respect to anything. Rare, so clarity before speed.
#pragma once

#include <ATen/core/Tensor.h>

#include "calls.h"

namespace bnext {

// As far as is known while a program is compiled.
bool is_empty(const at::Tensor& t);

// Shapes (C,) for broadcasting against x.
at::Tensor along_channels(const at::Tensor& v, const at::Tensor& x);

std::vector<int64_t> all_but_channels(const at::Tensor& x);

// xhat and invstd, differentiable in x, so that derivatives of any order are right. Of x in units of
// sqrt(var + eps), as it was saved: then var + eps is 1 in value, at a constant eps, and nothing overflows;
// the mean is 0 in value, and carries its derivative.
struct Standardised {
  at::Tensor xhat, invstd;
};
Standardised standardise(const at::Tensor& wide_x, const at::Tensor& stats, bool training);

// P(v) = v - m(v) - xhat * m(v * xhat), m the mean over a channel: the projection behind dx = w r P(dz).
// Self-adjoint; with fixed statistics the identity.
at::Tensor project(const at::Tensor& v, const at::Tensor& xhat, bool training);

// bn(x) + residual, of what these were before they were widened.
at::Tensor activation_input(const at::Tensor& xhat, const OptionalTensor& residual,
                            const OptionalTensor& weight, const OptionalTensor& bias);

// dz = dy * act'(z), in operations that torch knows the derivatives of.
at::Tensor activation_grad(const ActivationSpec& activation, const at::Tensor& dy, const at::Tensor& z);

// The same by the mask of a forward pass over x.
at::Tensor masked_grad(const ActivationSpec& activation, const at::Tensor& dy, const at::Tensor& mask,
                       const at::Tensor& x);

}  // namespace bnext

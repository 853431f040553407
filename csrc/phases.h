// The four phases of a training step as operators of their own, for who adds something in between: statistics
// of several processes. Schemas and what they mean stand in library.cpp.
//
// As in calls.h: from an operator's argument list, which stands here once, to an implementation of the call.
#pragma once

#include "calls.h"

namespace bnext {

using InputGradResult = std::tuple<at::Tensor, at::Tensor>;             // dx, dresidual
using GradSumsResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // sums, dweight, dbias

// The moments of x for a training forward over several processes. The other arguments are those of that
// forward, checked here, before any process waits for another; one value per channel is allowed.
template <at::Tensor (*Implementation)(const ForwardCall&)>
at::Tensor moments(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                   const OptionalTensor& bias, const OptionalTensor& running_mean,
                   const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked, double eps,
                   ActivationName activation, std::optional<double> activation_param) {
  TORCH_CHECK(x.defined(), "expected input to be a tensor, but got None");
  ForwardCall call{x,
                   residual,
                   weight,
                   bias,
                   running_mean,
                   running_var,
                   num_batches_tracked,
                   /*training=*/true,
                   0.0,
                   eps,
                   true,
                   {},
                   require_activation(activation, activation_param),
                   /*for_backward=*/false,
                   /*skip_nonfinite=*/false};
  call.alone = false;
  call.check();
  require_not_differentiable("running_mean", running_mean);
  require_not_differentiable("running_var", running_var);
  return Implementation(call);
}

// An inference with these moments for running statistics.
template <ForwardResult (*Implementation)(const ForwardCall&)>
ForwardResult normalize(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                        const OptionalTensor& bias, const at::Tensor& moments, double eps,
                        ActivationName activation, std::optional<double> activation_param,
                        bool for_backward) {
  require_input(x, {});
  require_moments(moments, x);
  const OptionalTensor mean = moments.select(0, 0), var = moments.select(0, 1), none;
  return Implementation({x,
                         residual,
                         weight,
                         bias,
                         mean,
                         var,
                         none,
                         /*training=*/false,
                         0.0,
                         eps,
                         true,
                         {},
                         require_activation(activation, activation_param),
                         for_backward,
                         /*skip_nonfinite=*/false,
                         /*keeps_input=*/true,
                         /*exact_statistics=*/true});
}

template <GradSumsResult (*Implementation)(const BackwardCall&)>
GradSumsResult grad_sums(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& residual,
                         const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& bias,
                         const at::Tensor& stats, ActivationName activation,
                         std::optional<double> activation_param) {
  return Implementation({dy, x, residual, mask, weight, bias, stats, /*training=*/true,
                         require_activation(activation, activation_param), /*from_output=*/false,
                         /*output_mask=*/{false, true, true, false}});
}

// output_mask: dx, dresidual.
template <InputGradResult (*Implementation)(const BackwardCall&, const at::Tensor& sums)>
InputGradResult input_grad(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& residual,
                           const OptionalTensor& mask, const OptionalTensor& weight,
                           const OptionalTensor& bias, const at::Tensor& stats, const at::Tensor& sums,
                           ActivationName activation, std::optional<double> activation_param,
                           std::array<bool, 2> output_mask) {
  return Implementation({dy, x, residual, mask, weight, bias, stats, /*training=*/true,
                         require_activation(activation, activation_param), /*from_output=*/false,
                         /*output_mask=*/{output_mask[0], false, false, output_mask[1]}},
                        sums);
}

// dense and meta as in calls.h.
at::Tensor moments_dense(const ForwardCall& call);
at::Tensor moments_meta(const ForwardCall& call);
GradSumsResult grad_sums_dense(const BackwardCall& call);
GradSumsResult grad_sums_meta(const BackwardCall& call);
InputGradResult input_grad_dense(const BackwardCall& call, const at::Tensor& sums);
InputGradResult input_grad_meta(const BackwardCall& call, const at::Tensor& sums);

}  // namespace bnext

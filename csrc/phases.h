// The four phases of a training step as operators of their own, for who adds something in between: statistics
// of several processes. Schemas and what they mean stand in library.cpp.
#pragma once

#include "calls.h"

namespace bnext {

using InputGradResult = std::tuple<at::Tensor, at::Tensor>;             // dx, dresidual
using GradSumsResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // sums, dweight, dbias

at::Tensor moments_dense(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& running_mean,
                         const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                         double eps, ActivationName activation, std::optional<double> activation_param);
at::Tensor moments_meta(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& running_mean,
                        const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                        double eps, ActivationName activation, std::optional<double> activation_param);

ForwardResult normalize_dense(const at::Tensor& x, const OptionalTensor& residual,
                              const OptionalTensor& weight, const OptionalTensor& bias,
                              const at::Tensor& moments, double eps, ActivationName activation,
                              std::optional<double> activation_param, bool for_backward);
ForwardResult normalize_meta(const at::Tensor& x, const OptionalTensor& residual,
                             const OptionalTensor& weight, const OptionalTensor& bias,
                             const at::Tensor& moments, double eps, ActivationName activation,
                             std::optional<double> activation_param, bool for_backward);

GradSumsResult grad_sums_dense(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& residual,
                               const OptionalTensor& mask, const OptionalTensor& weight,
                               const OptionalTensor& bias, const at::Tensor& stats, ActivationName activation,
                               std::optional<double> activation_param);
GradSumsResult grad_sums_meta(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& residual,
                              const OptionalTensor& mask, const OptionalTensor& weight,
                              const OptionalTensor& bias, const at::Tensor& stats, ActivationName activation,
                              std::optional<double> activation_param);

InputGradResult input_grad_dense(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& residual,
                                 const OptionalTensor& mask, const OptionalTensor& weight,
                                 const OptionalTensor& bias, const at::Tensor& stats, const at::Tensor& sums,
                                 ActivationName activation, std::optional<double> activation_param,
                                 std::array<bool, 2> output_mask);
InputGradResult input_grad_meta(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& residual,
                                const OptionalTensor& mask, const OptionalTensor& weight,
                                const OptionalTensor& bias, const at::Tensor& stats, const at::Tensor& sums,
                                ActivationName activation, std::optional<double> activation_param,
                                std::array<bool, 2> output_mask);

}  // namespace bnext

// The operators at tensor level. Schemas and what they mean stand in library.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/string_view.h>

#include <array>
#include <optional>
#include <tuple>

#include "plan.h"

namespace bnext {

using OptionalTensor = std::optional<at::Tensor>;
using ActivationName = std::optional<c10::string_view>;
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // y, stats, mask
using BackwardResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // dx, dweight, dbias, dresidual

using ForwardSignature = ForwardResult(const at::Tensor& x, const OptionalTensor& residual,
                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                       const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                       const OptionalTensor& num_batches_tracked, bool training,
                                       std::optional<double> momentum, double eps, bool unbiased_running_var,
                                       at::IntArrayRef ndims, ActivationName activation,
                                       std::optional<double> activation_param, bool for_backward,
                                       bool skip_nonfinite, bool keeps_input);
// Writes nothing.
using NoUpdateSignature = ForwardResult(const at::Tensor& x, const OptionalTensor& residual,
                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                        const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                        bool training, double eps, at::IntArrayRef ndims,
                                        ActivationName activation, std::optional<double> activation_param,
                                        bool for_backward, bool keeps_input);
// Over x; returns stats.
using InplaceSignature = at::Tensor(const at::Tensor& x, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const OptionalTensor& running_mean,
                                    const OptionalTensor& running_var,
                                    const OptionalTensor& num_batches_tracked, bool training,
                                    std::optional<double> momentum, double eps, bool unbiased_running_var,
                                    at::IntArrayRef ndims, ActivationName activation,
                                    std::optional<double> activation_param, bool for_backward,
                                    bool skip_nonfinite);
using BackwardSignature = BackwardResult(const at::Tensor& dy, const at::Tensor& x,
                                         const OptionalTensor& residual, const OptionalTensor& mask,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         const at::Tensor& stats, bool training, ActivationName activation,
                                         std::optional<double> activation_param, bool from_output,
                                         std::array<bool, 4> output_mask);

ForwardSignature batch_norm_autograd;
NoUpdateSignature batch_norm_no_update_autograd;
InplaceSignature batch_norm_inplace_autograd;
BackwardSignature batch_norm_backward_autograd;

// The operators as the dispatcher calls them: every mode and every key on the tensors has its say.
const c10::TypedOperatorHandle<ForwardSignature>& forward_operator();
const c10::TypedOperatorHandle<NoUpdateSignature>& no_update_operator();
const c10::TypedOperatorHandle<InplaceSignature>& inplace_operator();
const c10::TypedOperatorHandle<BackwardSignature>& backward_operator();

// The memory order the kernels see: channels last if x is dense in that order, else contiguous.
at::MemoryFormat memory_format_of(const at::Tensor& x);
Extent extent_of(at::IntArrayRef sizes, bool channels_last);
Dtype dtype_of(at::ScalarType dtype);

// The dtype of arithmetic on x, and of dweight and dbias: float64 for float64, else float32.
at::ScalarType math_dtype(const at::Tensor& x);

}  // namespace bnext

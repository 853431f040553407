// The arguments of an operator's call and what has to hold among them, for kernels and meta implementations
// alike. Nothing is written before all of it holds.
#pragma once

#include <utility>

#include "checks.h"
#include "ops.h"

namespace bnext {

// Of batch_norm, of batch_norm_, which has no residual, and of the phases moments and normalize.
struct ForwardCall {
  const at::Tensor& x;
  const OptionalTensor &residual, &weight, &bias, &running_mean, &running_var, &num_batches_tracked;
  bool training;
  std::optional<double> momentum;
  double eps;
  bool unbiased_running_var;
  at::IntArrayRef ndims;
  ActivationSpec activation;
  bool for_backward;
  bool skip_nonfinite;
  bool keeps_input = true;        // backward will have x
  bool exact_statistics = false;  // running ones are float64 beside any input
  bool alone = true;              // no other process has values: one per channel is too few

  void check() const {
    require_input(x, ndims);
    if (training && alone) require_enough_values(x);
    require_eps(eps, training);
    require_running_pair(running_mean, running_var, training);
    ParameterDtype dtypes{x};
    const std::pair<const char*, const OptionalTensor&> vectors[] = {
        {"running_mean", running_mean}, {"running_var", running_var}, {"weight", weight}, {"bias", bias}};
    for (const auto& [name, vector] : vectors) require_channel_vector(name, vector, x);
    for (const auto& [name, vector] : vectors) {
      const bool running = &vector == &running_mean || &vector == &running_var;
      if (!(exact_statistics && running)) dtypes.require(name, vector);
    }
    require_counter(num_batches_tracked, x);
    for (const OptionalTensor* state : {&running_mean, &running_var, &num_batches_tracked}) {
      if (training && present(*state)) require_writable(**state);
    }
    require_like_input("residual", residual, x);
  }

  // Of stats.
  int64_t stats_rows() const { return for_backward ? kKeptRows : kStatisticsRows; }

  // Bytes of the mask that backward will read; 0: none.
  template <class Size>
  Size mask_size(const Size& numel) const {
    const bool masked = for_backward && (present(residual) || !keeps_input) && is_masked(activation.kind);
    return masked ? mask_bytes(numel) : Size(0);
  }
};

struct BackwardCall {
  const at::Tensor &dy, &x;
  const OptionalTensor &residual, &mask, &weight, &bias;
  const at::Tensor& stats;
  bool training;
  ActivationSpec activation;
  bool from_output;
  std::array<bool, 4> output_mask;

  void check() const {
    require_input(x, {});
    require_like_input("dy", dy, x);
    ParameterDtype dtypes{x, /*or_kept=*/true};
    const std::pair<const char*, const OptionalTensor&> vectors[] = {{"weight", weight}, {"bias", bias}};
    for (const auto& [name, vector] : vectors) {
      require_channel_vector(name, vector, x);
      dtypes.require(name, vector);
    }
    require_statistics(stats, x);
    require_slope_source(residual, mask, from_output, activation, x, output_mask[3]);
    if (from_output) require_invertible(activation, x.scalar_type());
  }
};

// From the operators' argument lists, which stand in ops.h, to an implementation of the call.
template <ForwardResult (*Implementation)(const ForwardCall&)>
ForwardResult batch_norm(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& running_mean,
                         const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                         bool training, std::optional<double> momentum, double eps, bool unbiased_running_var,
                         at::IntArrayRef ndims, ActivationName activation,
                         std::optional<double> activation_param, bool for_backward, bool skip_nonfinite,
                         bool keeps_input) {
  return Implementation({x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training,
                         momentum, eps, unbiased_running_var, ndims,
                         require_activation(activation, activation_param), for_backward, skip_nonfinite,
                         keeps_input});
}

template <ForwardResult (*Implementation)(const ForwardCall&)>
ForwardResult batch_norm_no_update(const at::Tensor& x, const OptionalTensor& residual,
                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                   bool training, double eps, at::IntArrayRef ndims,
                                   ActivationName activation, std::optional<double> activation_param,
                                   bool for_backward, bool keeps_input) {
  TORCH_CHECK(!training || !(present(running_mean) || present(running_var)),
              "expected no running statistics in training, for nothing is updated");
  const OptionalTensor counter;
  return Implementation({x, residual, weight, bias, running_mean, running_var, counter, training,
                         /*momentum=*/0.0, eps, /*unbiased_running_var=*/true, ndims,
                         require_activation(activation, activation_param), for_backward,
                         /*skip_nonfinite=*/false, keeps_input});
}

template <at::Tensor (*Implementation)(const ForwardCall&)>
at::Tensor batch_norm_inplace(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& running_mean, const OptionalTensor& running_var,
                              const OptionalTensor& num_batches_tracked, bool training,
                              std::optional<double> momentum, double eps, bool unbiased_running_var,
                              at::IntArrayRef ndims, ActivationName activation,
                              std::optional<double> activation_param, bool for_backward,
                              bool skip_nonfinite) {
  return Implementation({x, std::nullopt, weight, bias, running_mean, running_var, num_batches_tracked,
                         training, momentum, eps, unbiased_running_var, ndims,
                         require_activation(activation, activation_param), for_backward, skip_nonfinite});
}

template <BackwardResult (*Implementation)(const BackwardCall&)>
BackwardResult batch_norm_backward(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& residual,
                                   const OptionalTensor& mask, const OptionalTensor& weight,
                                   const OptionalTensor& bias, const at::Tensor& stats, bool training,
                                   ActivationName activation, std::optional<double> activation_param,
                                   bool from_output, std::array<bool, 4> output_mask) {
  return Implementation({dy, x, residual, mask, weight, bias, stats, training,
                         require_activation(activation, activation_param), from_output, output_mask});
}

// dense: the same for every device that has an engine. meta: shapes, for torch.compile and export.
ForwardResult forward_dense(const ForwardCall& call);
ForwardResult forward_meta(const ForwardCall& call);
at::Tensor inplace_dense(const ForwardCall& call);
at::Tensor inplace_meta(const ForwardCall& call);
BackwardResult backward_dense(const BackwardCall& call);
BackwardResult backward_meta(const BackwardCall& call);

}  // namespace bnext

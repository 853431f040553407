// The arguments of an operator's call and what has to hold among them, for kernels and meta implementations
// alike. Nothing is written before all of it holds.
#pragma once

#include <utility>

#include "checks.h"
#include "ops.h"

namespace bnext {

// Of batch_norm and batch_norm_, but for the tensors as large as the input.
struct ForwardCall {
  const OptionalTensor &weight, &bias, &running_mean, &running_var, &num_batches_tracked;
  bool training;
  std::optional<double> momentum;
  double eps;
  bool unbiased_running_var;
  ActivationSpec activation;

  void check(const at::Tensor& x, at::IntArrayRef ndims) const {
    require_input(x, ndims);
    if (training) require_enough_values(x);
    require_eps(eps, training);
    require_running_pair(running_mean, running_var, training);
    ParameterDtype dtypes{x};
    const std::pair<const char*, const OptionalTensor&> vectors[] = {
        {"running_mean", running_mean}, {"running_var", running_var}, {"weight", weight}, {"bias", bias}};
    for (const auto& [name, vector] : vectors) require_channel_vector(name, vector, x);
    for (const auto& [name, vector] : vectors) dtypes.require(name, vector);
    require_counter(num_batches_tracked, x);
  }

  // Bytes of the mask that backward will read; 0: none.
  template <class Size>
  Size mask_size(const OptionalTensor& residual, bool for_backward, const Size& numel) const {
    return for_backward && present(residual) && is_masked(activation.kind) ? mask_bytes(numel) : Size(0);
  }
};

struct BackwardCall {
  const at::Tensor &dy, &x;
  const OptionalTensor &residual, &mask, &weight, &bias;
  const at::Tensor& stats;
  ActivationSpec activation;
  bool from_output;
  std::array<bool, 4> output_mask;

  void check() const {
    require_input(x, {});
    require_like_input("dy", dy, x);
    ParameterDtype dtypes{x};
    const std::pair<const char*, const OptionalTensor&> vectors[] = {{"weight", weight}, {"bias", bias}};
    for (const auto& [name, vector] : vectors) {
      require_channel_vector(name, vector, x);
      dtypes.require(name, vector);
    }
    require_statistics(stats, x);
    require_slope_source(residual, mask, from_output, activation, x, output_mask[3]);
    if (from_output) require_invertible(activation);
  }

  // Of dweight and dbias.
  at::ScalarType parameter_dtype() const { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
};

}  // namespace bnext

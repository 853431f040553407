// What the operators return, without the values: for torch.compile, export and fake tensors.
#include <ATen/ops/empty.h>

#include "calls.h"

namespace bnext {

ForwardResult batch_norm_meta(const at::Tensor& x, const OptionalTensor& residual,
                              const OptionalTensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& running_mean, const OptionalTensor& running_var,
                              const OptionalTensor& num_batches_tracked, bool training,
                              std::optional<double> momentum, double eps, bool unbiased_running_var,
                              at::IntArrayRef ndims, ActivationName activation,
                              std::optional<double> activation_param, bool for_backward) {
  const ForwardCall call{weight,
                         bias,
                         running_mean,
                         running_var,
                         num_batches_tracked,
                         training,
                         momentum,
                         eps,
                         unbiased_running_var,
                         require_activation(activation, activation_param)};
  call.check(x, ndims);
  require_like_input("residual", residual, x);
  const auto mask_size = call.mask_size(residual, for_backward, x.sym_numel());
  return {at::empty_symint(x.sym_sizes(), x.options(), memory_format_of(x)),
          at::empty_symint({2, x.sym_size(1)}, x.options().dtype(at::kDouble)),
          at::empty_symint({mask_size}, x.options().dtype(at::kByte))};
}

at::Tensor batch_norm_inplace_meta(const at::Tensor& x, const OptionalTensor& weight,
                                   const OptionalTensor& bias, const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var,
                                   const OptionalTensor& num_batches_tracked, bool training,
                                   std::optional<double> momentum, double eps, bool unbiased_running_var,
                                   at::IntArrayRef ndims, ActivationName activation,
                                   std::optional<double> activation_param, bool) {
  const ForwardCall call{weight,
                         bias,
                         running_mean,
                         running_var,
                         num_batches_tracked,
                         training,
                         momentum,
                         eps,
                         unbiased_running_var,
                         require_activation(activation, activation_param)};
  call.check(x, ndims);
  require_invertible(call.activation);
  return at::empty_symint({2, x.sym_size(1)}, x.options().dtype(at::kDouble));
}

BackwardResult batch_norm_backward_meta(const at::Tensor& dy, const at::Tensor& x,
                                        const OptionalTensor& residual, const OptionalTensor& mask,
                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                        const at::Tensor& stats, bool, ActivationName activation,
                                        std::optional<double> activation_param, bool from_output,
                                        std::array<bool, 4> output_mask) {
  const BackwardCall call{dy,          x,          residual, mask,
                          weight,      bias,       stats,    require_activation(activation, activation_param),
                          from_output, output_mask};
  call.check();
  auto like_x = [&](bool wanted) {
    return wanted ? at::empty_symint(x.sym_sizes(), x.options(), memory_format_of(x))
                  : at::empty_symint({0}, x.options());
  };
  const auto options = x.options().dtype(call.parameter_dtype());
  auto per_channel = [&](bool wanted) {
    return at::empty_symint({wanted ? x.sym_size(1) : c10::SymInt(0)}, options);
  };
  return {like_x(output_mask[0]), per_channel(output_mask[1]), per_channel(output_mask[2]),
          like_x(output_mask[3])};
}

}  // namespace bnext

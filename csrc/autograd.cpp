// The operators under autograd, to any order and in either mode: a node where something requires a gradient,
// a tangent where something has one, versions of what is written. The backward is an operator of its own,
// whose derivatives are written in differentiable torch operations.
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include "forward_mode.h"
#include "nodes.h"
#include "versions.h"

namespace bnext {
namespace {

// In torch's words. batch_norm_ would have to write its tangent over x's.
template <class... Tensors>
void refuse_forward_mode(const Tensors&... tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(!any_tangent(tensors...),
                              "Trying to use forward AD with bnext::batch_norm_ that does not support it "
                              "because it has not been implemented yet.");
}

void check_differentiability(const at::Tensor& x, const OptionalTensor& running_mean,
                             const OptionalTensor& running_var) {
  TORCH_CHECK(x.defined(), "expected input to be a tensor, but got None");
  for (const auto& [name, running] :
       {std::pair{"running_mean", &running_mean}, std::pair{"running_var", &running_var}}) {
    if (at::GradMode::is_enabled()) require_not_differentiable(name, *running);
    require_own_elements(name, *running);
  }
}

// A forward that has an output of its own. below: the operator without autograd, of what it is to keep.
template <class Below>
ForwardResult differentiable(const at::Tensor& x, const OptionalTensor& residual,
                             const OptionalTensor& weight, const OptionalTensor& bias, bool training,
                             const SavedActivation& activation, bool for_backward, bool keeps_input,
                             const Below& below) {
  Held<BatchNormNode> node;
  if (torch::autograd::compute_requires_grad(x, residual, weight, bias)) {
    node = make_node<BatchNormNode>(x, residual, weight, bias, training, activation, /*from_output=*/false);
  }
  ForwardResult result;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    result = below(for_backward || node, node ? !node->format_of_x.has_value() : keeps_input);
  }
  const auto& [y, stats, mask] = result;
  if (node) {
    torch::autograd::set_history(y, node);
    node->stats = SavedVariable(stats, /*is_output=*/false);
    if (mask.sym_numel() != 0) node->mask = SavedVariable(mask, /*is_output=*/false);
  }
  if (any_tangent(x, residual, weight, bias)) {
    y._set_fw_grad(forward_tangent(x, residual, weight, bias, stats, training, activation.spec), /*level=*/0,
                   /*is_inplace_op=*/false);
  }
  return result;
}

}  // namespace

ForwardResult batch_norm_autograd(const at::Tensor& x, const OptionalTensor& residual,
                                  const OptionalTensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                  const OptionalTensor& num_batches_tracked, bool training,
                                  std::optional<double> momentum, double eps, bool unbiased_running_var,
                                  at::IntArrayRef ndims, ActivationName activation,
                                  std::optional<double> activation_param, bool for_backward,
                                  bool skip_nonfinite, bool keeps_input) {
  check_differentiability(x, running_mean, running_var);
  const ForwardResult result =
      differentiable(x, residual, weight, bias, training, {activation, activation_param}, for_backward,
                     keeps_input, [&](bool kept_for_backward, bool input_kept) {
                       return forward_operator().call(
                           x, residual, weight, bias, running_mean, running_var, num_batches_tracked,
                           training, momentum, eps, unbiased_running_var, ndims, activation, activation_param,
                           kept_for_backward, skip_nonfinite, input_kept);
                     });
  if (training) bump_versions({running_mean, running_var, num_batches_tracked});
  return result;
}

ForwardResult batch_norm_no_update_autograd(const at::Tensor& x, const OptionalTensor& residual,
                                            const OptionalTensor& weight, const OptionalTensor& bias,
                                            const OptionalTensor& running_mean,
                                            const OptionalTensor& running_var, bool training, double eps,
                                            at::IntArrayRef ndims, ActivationName activation,
                                            std::optional<double> activation_param, bool for_backward,
                                            bool keeps_input) {
  check_differentiability(x, running_mean, running_var);
  return differentiable(x, residual, weight, bias, training, {activation, activation_param}, for_backward,
                        keeps_input, [&](bool kept_for_backward, bool input_kept) {
                          return no_update_operator().call(x, residual, weight, bias, running_mean,
                                                           running_var, training, eps, ndims, activation,
                                                           activation_param, kept_for_backward, input_kept);
                        });
}

at::Tensor batch_norm_inplace_autograd(const at::Tensor& x, const OptionalTensor& weight,
                                       const OptionalTensor& bias, const OptionalTensor& running_mean,
                                       const OptionalTensor& running_var,
                                       const OptionalTensor& num_batches_tracked, bool training,
                                       std::optional<double> momentum, double eps, bool unbiased_running_var,
                                       at::IntArrayRef ndims, ActivationName activation,
                                       std::optional<double> activation_param, bool for_backward,
                                       bool skip_nonfinite) {
  check_differentiability(x, running_mean, running_var);
  refuse_forward_mode(x, weight, bias);
  const bool differentiable = torch::autograd::compute_requires_grad(x, weight, bias);
  torch::autograd::check_inplace(x, differentiable);
  require_own_elements("input", x);
  Held<BatchNormNode> node;
  if (differentiable) {
    node = make_node<BatchNormNode>(x, std::nullopt, weight, bias, training,
                                    SavedActivation(activation, activation_param), /*from_output=*/true);
  }
  at::Tensor stats;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    stats = inplace_operator().call(x, weight, bias, running_mean, running_var, num_batches_tracked, training,
                                    momentum, eps, unbiased_running_var, ndims, activation, activation_param,
                                    for_backward || node, skip_nonfinite);
  }
  bump_versions({x});
  if (node) {
    torch::autograd::rebase_history(x, node);
    node->x = KeptInput(SavedVariable(x, /*is_output=*/true, /*is_inplace_on_view=*/x.is_view()));
    node->stats = SavedVariable(stats, /*is_output=*/false);
  }
  if (training) bump_versions({running_mean, running_var, num_batches_tracked});
  return stats;
}

BackwardResult batch_norm_backward_autograd(const at::Tensor& dy, const at::Tensor& x,
                                            const OptionalTensor& residual, const OptionalTensor& mask,
                                            const OptionalTensor& weight, const OptionalTensor& bias,
                                            const at::Tensor& stats, bool training, ActivationName activation,
                                            std::optional<double> activation_param, bool from_output,
                                            std::array<bool, 4> output_mask) {
  const bool has_tangent = any_tangent(dy, x, residual, weight, bias);
  if (from_output) refuse_forward_mode(dy, x, weight, bias);
  Held<BatchNormBackwardNode> node;
  if (torch::autograd::compute_requires_grad(dy, x, residual, weight, bias)) {
    node = make_node<BatchNormBackwardNode>(dy, x, residual, mask, weight, bias, stats, training,
                                            SavedActivation(activation, activation_param), from_output);
  }
  BackwardResult result;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    result = backward_operator().call(dy, x, residual, mask, weight, bias, stats, training, activation,
                                      activation_param, from_output, output_mask);
  }
  if (node) {
    std::apply([&](const auto&... outputs) { (torch::autograd::set_history(outputs, node), ...); }, result);
  }
  if (has_tangent) {
    const BackwardCall call{dy,          x,          residual,
                            mask,        weight,     bias,
                            stats,       training,   require_activation(activation, activation_param),
                            from_output, output_mask};
    const BackwardResult tangents = backward_tangents(call);
    const auto attach = [](const at::Tensor& output, const at::Tensor& tangent) {
      if (tangent.defined()) output._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
    };
    attach(std::get<0>(result), std::get<0>(tangents));
    attach(std::get<1>(result), std::get<1>(tangents));
    attach(std::get<2>(result), std::get<2>(tangents));
    attach(std::get<3>(result), std::get<3>(tangents));
  }
  return result;
}

}  // namespace bnext

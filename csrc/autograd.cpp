// Autograd nodes over the operators, to any order.
//
// What the forward keeps: x, a copy of the weight, and the statistics; never a running buffer. The backward
// is an operator of its own, whose derivative is written in differentiable torch operations.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include "checks.h"
#include "double_backward.h"
#include "ops.h"

namespace bnext {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Nodes belong to shared pointers up to torch 2.11, to intrusive ones later; an edge tells.
template <class N>
using Held = std::conditional_t<
    std::is_same_v<decltype(torch::autograd::Edge::function), std::shared_ptr<torch::autograd::Node>>,
    std::shared_ptr<N>, c10::intrusive_ptr<N>>;

template <class N, class... Arguments>
Held<N> make_node(Arguments&&... arguments) {
  if constexpr (std::is_same_v<Held<N>, std::shared_ptr<N>>) {
    // torch's own deleter, found by the base class: it takes a long graph apart without recursion.
    return Held<N>(new N(std::forward<Arguments>(arguments)...), [](N* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<N>(std::forward<Arguments>(arguments)...);
  }
}

bool requires_grad(const OptionalTensor& t) { return present(t) && t->requires_grad(); }

// In torch's words. Without it a tangent would be dropped in silence.
template <class... Tensors>
void refuse_forward_mode(const Tensors&... tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !(torch::autograd::isFwGradDefined(tensors) || ...),
      "Trying to use forward AD with bnext::batch_norm that does not support it because "
      "it has not been implemented yet.");
}

OptionalTensor optional(const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// What a parameter's gradient has to look like: any shape of C elements will do, in the input's dtype or
// float32.
struct Likeness {
  at::ScalarType dtype = at::ScalarType::Undefined;
  at::DimVector sizes;

  explicit Likeness(const OptionalTensor& parameter) {
    if (!present(parameter)) return;
    dtype = parameter->scalar_type();
    sizes = parameter->sizes();
  }
  at::Tensor of(at::Tensor grad) const {
    if (grad.scalar_type() != dtype) grad = grad.to(dtype);
    return sizes.size() == 1 ? grad : grad.view(sizes);
  }
};

// An activation that outlives the call.
struct SavedActivation {
  ActivationSpec spec;
  ActivationName name;  // of the table in activation.h
  std::optional<double> param;

  SavedActivation(ActivationName given, std::optional<double> given_param)
      : spec(require_activation(given, given_param)), param(given_param) {
    if (spec) name = activation_name(spec.kind);
  }
};

// A copy of the weight that stands in the graph where the weight does: loading a state between forward and
// backward must not disturb backward.
at::Tensor copy_for_backward(const OptionalTensor& weight) {
  if (!present(weight)) return {};
  at::Tensor copy;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    copy = weight->clone();
  }
  if (weight->requires_grad()) {
    torch::autograd::impl::set_gradient_edge(copy, torch::autograd::impl::gradient_edge(*weight));
  }
  return copy;
}

// From y to x, weight and bias: written out as torch's own nodes are, because torch::autograd::Function takes
// longer than a small batch does.
struct BatchNormNode : torch::autograd::Node {
  SavedVariable x, weight, bias, stats;  // the bias with an activation only
  Likeness weight_like, bias_like;
  bool training;
  SavedActivation activation;

  BatchNormNode(const Variable& x, const OptionalTensor& weight, const OptionalTensor& bias, bool training,
                const SavedActivation& activation)
      : Node(torch::autograd::collect_next_edges(x, weight, bias)),
        x(x, /*is_output=*/false),
        weight(copy_for_backward(weight), /*is_output=*/false),
        bias(activation.spec ? copy_for_backward(bias) : at::Tensor(), /*is_output=*/false),
        weight_like(weight),
        bias_like(bias),
        training(training),
        activation(activation) {}

  std::string name() const override { return "bnext::BatchNormBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&x, &weight, &bias, &stats}) saved->reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(3);
    if (!grads[0].defined()) return result;
    const std::array<bool, 3> wanted{task_should_compute_output(0), task_should_compute_output(1),
                                     task_should_compute_output(2)};
    auto [dx, dweight, dbias] =
        backward_operator().call(grads[0], x.unpack(), optional(weight.unpack()), optional(bias.unpack()),
                                 stats.unpack(), training, activation.name, activation.param, wanted);
    if (wanted[0]) result[0] = std::move(dx);
    if (wanted[1]) result[1] = weight_like.of(std::move(dweight));
    if (wanted[2]) result[2] = bias_like.of(std::move(dbias));
    return result;
  }
};

// From dx, dweight and dbias to dy, x, weight and bias.
struct BatchNormBackwardNode : torch::autograd::Node {
  SavedVariable dy, x, weight, bias, stats;
  bool training;
  SavedActivation activation;

  BatchNormBackwardNode(const Variable& dy, const Variable& x, const OptionalTensor& weight,
                        const OptionalTensor& bias, const Variable& stats, bool training,
                        const SavedActivation& activation)
      : Node(torch::autograd::collect_next_edges(dy, x, weight, bias)),
        dy(dy, /*is_output=*/false),
        x(x, /*is_output=*/false),
        weight(weight.value_or(at::Tensor()), /*is_output=*/false),
        bias(bias.value_or(at::Tensor()), /*is_output=*/false),
        stats(stats, /*is_output=*/false),
        training(training),
        activation(activation) {}

  std::string name() const override { return "bnext::BatchNormBackwardBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&dy, &x, &weight, &bias, &stats}) saved->reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    auto [to_dy, to_x, to_weight, to_bias] =
        double_backward({grads[0], grads[1], grads[2]}, dy.unpack(), x.unpack(), weight.unpack(),
                        bias.unpack(), stats.unpack(), training, activation.spec);
    return {std::move(to_dy), std::move(to_x), std::move(to_weight), std::move(to_bias)};
  }
};

}  // namespace

ForwardResult batch_norm_autograd(const at::Tensor& x, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const OptionalTensor& running_mean,
                                  const OptionalTensor& running_var,
                                  const OptionalTensor& num_batches_tracked, bool training,
                                  std::optional<double> momentum, double eps, bool unbiased_running_var,
                                  at::IntArrayRef ndims, ActivationName activation,
                                  std::optional<double> activation_param) {
  TORCH_CHECK(x.defined(), "expected input to be a tensor, but got None");
  for (const auto& [name, t] : {std::pair<const char*, const OptionalTensor&>("running_mean", running_mean),
                                std::pair<const char*, const OptionalTensor&>("running_var", running_var)}) {
    TORCH_CHECK(!requires_grad(t), name, " is not differentiable: it cannot have requires_grad=True");
  }
  refuse_forward_mode(x, weight, bias);
  Held<BatchNormNode> node;
  if (at::GradMode::is_enabled() && (x.requires_grad() || requires_grad(weight) || requires_grad(bias))) {
    node = make_node<BatchNormNode>(x, weight, bias, training, SavedActivation(activation, activation_param));
  }
  ForwardResult result;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    result =
        forward_operator().call(x, weight, bias, running_mean, running_var, num_batches_tracked, training,
                                momentum, eps, unbiased_running_var, ndims, activation, activation_param);
  }
  if (node) {
    const auto& [y, stats] = result;
    torch::autograd::set_history(y, node);
    node->stats = SavedVariable(stats, /*is_output=*/false);
  }
  if (training) {
    for (const OptionalTensor& written : {running_mean, running_var, num_batches_tracked}) {
      if (present(written) && !written->is_inference()) written->unsafeGetTensorImpl()->bump_version();
    }
  }
  return result;
}

BackwardResult batch_norm_backward_autograd(const at::Tensor& dy, const at::Tensor& x,
                                            const OptionalTensor& weight, const OptionalTensor& bias,
                                            const at::Tensor& stats, bool training, ActivationName activation,
                                            std::optional<double> activation_param,
                                            std::array<bool, 3> output_mask) {
  refuse_forward_mode(dy, x, weight, bias);
  Held<BatchNormBackwardNode> node;
  if (at::GradMode::is_enabled() &&
      (dy.requires_grad() || x.requires_grad() || requires_grad(weight) || requires_grad(bias))) {
    node = make_node<BatchNormBackwardNode>(dy, x, weight, bias, stats, training,
                                            SavedActivation(activation, activation_param));
  }
  BackwardResult result;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    result = backward_operator().call(dy, x, weight, bias, stats, training, activation, activation_param,
                                      output_mask);
  }
  if (node) {
    std::apply([&](const auto&... outputs) { (torch::autograd::set_history(outputs, node), ...); }, result);
  }
  return result;
}

}  // namespace bnext

// Autograd nodes of the operators.
//
// What the forward keeps: x, or y where that was written over x, or neither where statistics are fixed and
// only dy is needed; the statistics, with weight and bias as they were, for loading a state between forward
// and backward must not disturb backward; between a residual and an activation the mask, or the residual;
// the mask, too, of an activation that would need x for nothing else.
// Never a running buffer.
#pragma once

#include <torch/csrc/autograd/functions/utils.h>

#include "double_backward.h"
#include "kept.h"
#include "ops.h"

namespace bnext {

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

// To the node itself, for an output that it keeps.
template <class N>
Held<N> held(N* node) {
  if constexpr (std::is_same_v<Held<N>, std::shared_ptr<N>>) {
    return node->getptr();
  } else {
    return Held<N>::reclaim_copy(node);
  }
}

inline OptionalTensor optional(const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// From y to x, residual, weight and bias: written out as torch's own nodes are, because
// torch::autograd::Function takes longer than a small batch does.
struct BatchNormNode : torch::autograd::Node {
  KeptInput x;                                  // from_output: y, an output of this node
  std::optional<at::MemoryFormat> format_of_x;  // in place of x
  SavedVariable residual, mask, stats;
  KeptParameter weight, bias;
  bool training, from_output;
  SavedActivation activation;

  BatchNormNode(const Variable& input, const OptionalTensor& given_residual,
                const OptionalTensor& given_weight, const OptionalTensor& given_bias, bool training,
                const SavedActivation& activation, bool from_output)
      : Node(torch::autograd::collect_next_edges(input, given_residual, given_weight, given_bias)),
        weight(given_weight),
        bias(given_bias),
        training(training),
        from_output(from_output),
        activation(activation) {
    const bool one_bit_tells = is_masked(activation.spec.kind);
    const bool keeps_x = needs_x(input, given_weight, one_bit_tells);
    const bool masked = one_bit_tells && (present(given_residual) || !keeps_x);
    if (keeps_x) {
      if (!from_output) x = KeptInput(input, masked);
    } else {
      format_of_x = memory_format_of(input);
    }
    if (present(given_residual) && activation.spec && !masked) {
      residual = SavedVariable(*given_residual, /*is_output=*/false);
    }
  }

  std::string name() const override { return "bnext::BatchNormBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    x.reset_data();
    for (SavedVariable* saved : {&residual, &mask, &stats}) saved->reset_data();
    for (KeptParameter* parameter : {&weight, &bias}) parameter->reset();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(4);
    const at::Tensor& dy = grads[0];
    if (!dy.defined()) return result;
    const bool wants_residual = task_should_compute_output(1);
    const std::array<bool, 4> wanted{task_should_compute_output(0), task_should_compute_output(2),
                                     task_should_compute_output(3), wants_residual && activation.spec};
    if (wants_residual && !activation.spec) result[1] = dy;
    if (wanted == std::array<bool, 4>{}) return result;
    const at::Tensor kept = stats.unpack();
    at::Tensor gradient = dy, input = from_output ? x.unpack(held<Node>(this)) : x.unpack();
    if (format_of_x) {  // anything like x will do for x
      if (tells_its_format(dy)) {
        input = gradient = dy.contiguous(*format_of_x);
      } else {
        input = at::empty_symint(dy.sym_sizes(), dy.options(), *format_of_x).zero_();
      }
    }
    OptionalTensor w = weight.unpack(kept, kKeptWeight, next_edge(2));
    OptionalTensor b;  // takes part in the activation's input, and in x where y stands for it
    if (activation.spec || from_output) b = bias.unpack(kept, kKeptBias, next_edge(3));
    if (present(w) && present(b) && w->scalar_type() != b->scalar_type()) {
      w = w->to(at::kDouble);  // one of them has a tangent, the other is a row of stats
      b = b->to(at::kDouble);
    }
    auto [dx, dweight, dbias, dresidual] =
        backward_operator().call(gradient, input, optional(residual.unpack()), optional(mask.unpack()), w, b,
                                 kept, training, activation.name, activation.param, from_output, wanted);
    if (wanted[0]) result[0] = std::move(dx);
    if (wanted[1]) result[2] = weight.like.of(std::move(dweight));
    if (wanted[2]) result[3] = bias.like.of(std::move(dbias));
    if (wanted[3]) result[1] = std::move(dresidual);
    return result;
  }

 private:
  // Fixed statistics make of dz all but the weight's gradient, and a mask finds dz.
  bool needs_x(const Variable& input, const OptionalTensor& given_weight, bool one_bit_tells) const {
    return training || from_output || (activation.spec && !one_bit_tells) ||
           (present(given_weight) && given_weight->requires_grad()) || !tells_its_format(input);
  }

  // Transformed ones do not, nor may a tangent be one of those.
  static bool tells_its_format(const Variable& t) {
    return !is_transformed(t) && !torch::autograd::isFwGradDefined(t);
  }
};

// From dx, dweight, dbias and dresidual to dy, x, residual, weight and bias.
struct BatchNormBackwardNode : torch::autograd::Node {
  KeptInput x;
  SavedVariable dy, residual, mask, weight, bias, stats;
  bool training, from_output;
  SavedActivation activation;

  BatchNormBackwardNode(const Variable& dy, const Variable& x, const OptionalTensor& residual,
                        const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& bias,
                        const Variable& stats, bool training, const SavedActivation& activation,
                        bool from_output)
      : Node(torch::autograd::collect_next_edges(dy, x, residual, weight, bias)),
        x(x, /*masked=*/present(mask)),
        dy(dy, /*is_output=*/false),
        residual(residual.value_or(at::Tensor()), /*is_output=*/false),
        mask(mask.value_or(at::Tensor()), /*is_output=*/false),
        weight(weight.value_or(at::Tensor()), /*is_output=*/false),
        bias(bias.value_or(at::Tensor()), /*is_output=*/false),
        stats(stats, /*is_output=*/false),
        training(training),
        from_output(from_output),
        activation(activation) {}

  std::string name() const override { return "bnext::BatchNormBackwardBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    x.reset_data();
    for (SavedVariable* saved : {&dy, &residual, &mask, &weight, &bias, &stats}) saved->reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK_NOT_IMPLEMENTED(!from_output,
                                "bnext::batch_norm_ has no second derivative: expected inplace=False where "
                                "gradients are differentiated");
    const Cotangents to{grads[0], grads[1], grads[2], grads[3]};
    BackwardInputs given{dy.unpack(),     x.unpack(),    residual.unpack(), mask.unpack(),
                         weight.unpack(), bias.unpack(), stats.unpack()};
    BackwardInputs result = double_backward(to, given, training, activation.spec);
    return {std::move(result.dy), std::move(result.x), std::move(result.residual), std::move(result.weight),
            std::move(result.bias)};
  }
};

}  // namespace bnext

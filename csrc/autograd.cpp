// Autograd nodes over the operators, to any order.
//
// What the forward keeps: x, a copy of the weight, and the statistics; never a running buffer. The backward
// is an operator of its own, whose derivative is written in differentiable torch operations.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "checks.h"
#include "ops.h"

namespace bnext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

template <class Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

const auto& forward_operator() {
  static const auto op = find_operator<ForwardSignature>("bnext::batch_norm");
  return op;
}

const auto& backward_operator() {
  static const auto op = find_operator<BackwardSignature>("bnext::batch_norm_backward");
  return op;
}

bool requires_grad(const OptionalTensor& t) { return present(t) && t->requires_grad(); }

OptionalTensor optional(const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

struct BatchNorm : torch::autograd::Function<BatchNorm> {
  static variable_list forward(AutogradContext* ctx, const Variable& x, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& running_mean,
                               const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                               bool training, std::optional<double> momentum, double eps,
                               bool unbiased_running_var, at::IntArrayRef ndims) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, stats] = forward_operator().call(x, weight, bias, running_mean, running_var, num_batches_tracked,
                                              training, momentum, eps, unbiased_running_var, ndims);
    ctx->save_for_backward({x, present(weight) ? *weight : Variable(), stats});
    ctx->saved_data["training"] = training;
    ctx->saved_data["bias_dtype"] = present(bias) ? static_cast<int64_t>(bias->scalar_type()) : int64_t{-1};
    ctx->saved_data["bias_size"] = present(bias) ? bias->sizes().vec() : std::vector<int64_t>();
    ctx->mark_non_differentiable({stats});
    ctx->set_materialize_grads(false);
    return {y, stats};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(11);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const Variable &x = saved[0], &weight = saved[1], &stats = saved[2];
    const int64_t bias_dtype = ctx->saved_data["bias_dtype"].toInt();
    // Edges are numbered over the tensors that were given: x, weight, bias.
    const bool wants_weight = weight.defined() && ctx->needs_input_grad(1);
    const bool wants_bias = bias_dtype >= 0 && ctx->needs_input_grad(weight.defined() ? 2 : 1);
    auto [dx, dweight, dbias] =
        backward_operator().call(grads[0], x, optional(weight), stats, ctx->saved_data["training"].toBool(),
                                 {ctx->needs_input_grad(0), wants_weight, wants_bias});
    if (ctx->needs_input_grad(0)) result[0] = dx;
    if (wants_weight) result[1] = dweight.to(weight.scalar_type()).view_as(weight);
    if (wants_bias) {
      result[2] =
          dbias.to(static_cast<at::ScalarType>(bias_dtype)).view(ctx->saved_data["bias_size"].toIntVector());
    }
    return result;
  }
};

// Shapes (C,) for broadcasting against x.
at::Tensor along_channels(const at::Tensor& v, const at::Tensor& x) {
  std::vector<c10::SymInt> sizes(x.dim(), 1);
  sizes[1] = x.sym_size(1);
  return v.reshape_symint(sizes);
}

struct BatchNormBackward : torch::autograd::Function<BatchNormBackward> {
  static variable_list forward(AutogradContext* ctx, const Variable& dy, const Variable& x,
                               const OptionalTensor& weight, const Variable& stats, bool training,
                               std::array<bool, 3> output_mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dweight, dbias] = backward_operator().call(dy, x, weight, stats, training, output_mask);
    ctx->save_for_backward({dy, x, present(weight) ? *weight : Variable(), stats});
    ctx->saved_data["training"] = training;
    ctx->set_materialize_grads(false);
    return {dx, dweight, dbias};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads);
};

// Let P(v) = v - m(v) - xhat * m(v * xhat), m the mean over a channel, r = invstd; P is the projection behind
// dx = w r P(dy), self-adjoint, and r P(v) is the pull-back of v through xhat. For the cotangents gx, gw, gb
// of dx, dweight, dbias:
//   to dy:  w r P(gx) + gw xhat + gb
//   to w:   sum(gx * r P(dy))
//   to x:   -w r^2 (xhat m(gx * P(dy)) + m(dy xhat) P(gx) + m(gx xhat) P(dy)) + gw r P(dy)
// With fixed statistics P is the identity and r a constant: the first factor of the last line vanishes.
variable_list BatchNormBackward::backward(AutogradContext* ctx, const variable_list& grads) {
  variable_list result(6);
  const auto saved = ctx->get_saved_variables();
  const bool training = ctx->saved_data["training"].toBool();
  const auto math = saved[1].scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor dy = saved[0].to(math), x = saved[1].to(math);
  const at::Tensor w = saved[2].defined() ? along_channels(saved[2].to(math), x) : at::ones({1}, x.options());
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d != 1) dims.push_back(d);
  }
  auto m = [&](const at::Tensor& v) { return v.mean(dims, /*keepdim=*/true); };

  // Differentiable in x, so that derivatives of any order are right: the saved invstd is 1/sqrt(var + eps) at
  // a constant eps, which var and invstd together determine.
  const at::Tensor saved_mean = along_channels(saved[3].select(0, 0), x);
  const at::Tensor saved_invstd = along_channels(saved[3].select(0, 1), x);
  at::Tensor mean = saved_mean.to(math), r = saved_invstd.to(math);
  at::Tensor centered = (x - mean);
  if (training) {
    const at::Tensor shift = m(centered);  // zero in value: carries the derivative of the mean
    centered = centered - shift;
    const at::Tensor var = m(centered * centered);
    const at::Tensor eps = (saved_invstd.pow(-2) - var.detach().to(at::kDouble)).to(math);
    r = (var + eps).rsqrt();
  }
  const at::Tensor xhat = centered * r;
  auto project = [&](const at::Tensor& v) { return training ? v - m(v) - xhat * m(v * xhat) : v; };

  const at::Tensor zero = at::zeros({1}, x.options());
  const bool has_gx = grads[0].defined() && grads[0].sym_numel() != 0;
  const bool has_gw = grads[1].defined() && grads[1].sym_numel() != 0;
  const bool has_gb = grads[2].defined() && grads[2].sym_numel() != 0;
  const at::Tensor gx = has_gx ? grads[0].to(math) : at::zeros_like(x);
  const at::Tensor gw = has_gw ? along_channels(grads[1].to(math), x) : zero;
  const at::Tensor gb = has_gb ? along_channels(grads[2].to(math), x) : zero;

  const at::Tensor projected_dy = project(dy);
  result[0] = (w * r * project(gx) + gw * xhat + gb).to(saved[0].scalar_type());
  at::Tensor to_x = gw * r * projected_dy;
  if (training) {
    to_x =
        to_x -
        w * r * r * (xhat * m(gx * projected_dy) + m(dy * xhat) * project(gx) + m(gx * xhat) * projected_dy);
  }
  result[1] = to_x.to(saved[1].scalar_type());
  if (saved[2].defined()) {
    result[2] = (gx * r * projected_dy).sum(dims).to(saved[2].scalar_type()).view_as(saved[2]);
  }
  return result;
}

}  // namespace

ForwardResult batch_norm_autograd(const at::Tensor& x, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const OptionalTensor& running_mean,
                                  const OptionalTensor& running_var,
                                  const OptionalTensor& num_batches_tracked, bool training,
                                  std::optional<double> momentum, double eps, bool unbiased_running_var,
                                  at::IntArrayRef ndims) {
  TORCH_CHECK(x.defined(), "expected input to be a tensor, but got None");
  for (const auto& [name, t] : {std::pair<const char*, const OptionalTensor&>("running_mean", running_mean),
                                std::pair<const char*, const OptionalTensor&>("running_var", running_var)}) {
    TORCH_CHECK(!requires_grad(t), name, " is not differentiable: it cannot have requires_grad=True");
  }
  ForwardResult result;
  if (at::GradMode::is_enabled() && (x.requires_grad() || requires_grad(weight) || requires_grad(bias))) {
    // Backward keeps a copy of the weight: loading a state between forward and backward must not disturb it.
    const OptionalTensor kept = present(weight) ? OptionalTensor(weight->clone()) : weight;
    auto outputs = BatchNorm::apply(x, kept, bias, running_mean, running_var, num_batches_tracked, training,
                                    momentum, eps, unbiased_running_var, ndims);
    result = {outputs[0], outputs[1]};
  } else {
    at::AutoDispatchBelowADInplaceOrView below;
    result = forward_operator().call(x, weight, bias, running_mean, running_var, num_batches_tracked,
                                     training, momentum, eps, unbiased_running_var, ndims);
  }
  if (training) {
    for (const OptionalTensor& written : {running_mean, running_var, num_batches_tracked}) {
      if (present(written) && !written->is_inference()) written->unsafeGetTensorImpl()->bump_version();
    }
  }
  return result;
}

BackwardResult batch_norm_backward_autograd(const at::Tensor& dy, const at::Tensor& x,
                                            const OptionalTensor& weight, const at::Tensor& stats,
                                            bool training, std::array<bool, 3> output_mask) {
  if (at::GradMode::is_enabled() && (dy.requires_grad() || x.requires_grad() || requires_grad(weight))) {
    auto outputs = BatchNormBackward::apply(dy, x, weight, stats, training, output_mask);
    return {outputs[0], outputs[1], outputs[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return backward_operator().call(dy, x, weight, stats, training, output_mask);
}

}  // namespace bnext

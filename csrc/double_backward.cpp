// Second and higher orders: rare, so clarity before speed.
#include "double_backward.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd.h>

#include "composed.h"

namespace bnext {
namespace {

bool given(const at::Tensor& cotangent) { return cotangent.defined() && !is_empty(cotangent); }

// The same value and tangent, but not the same tensor.
at::Tensor differentiable_leaf(const at::Tensor& t) {
  at::Tensor leaf = t.detach().requires_grad_();
  if (torch::autograd::isFwGradDefined(t)) leaf._set_fw_grad(t._fw_grad(0), /*level=*/0, false);
  return leaf;
}

// With project()'s P and m, r = invstd: r P(v) is the pull-back of v through xhat. For the cotangents gx, gw,
// gb of dx, dweight, dbias:
//   to dy:  w r P(gx) + gw xhat + gb
//   to w:   sum(gx * r P(dy))
//   to x:   -w r^2 (xhat m(gx * P(dy)) + m(dy xhat) P(gx) + m(gx xhat) P(dy)) + gw r P(dy)
// With fixed statistics P is the identity and r a constant: the first factor of the last line vanishes.
BackwardInputs without_activation(const Cotangents& to, const at::Tensor& given_dy, const at::Tensor& given_x,
                                  const at::Tensor& weight, const at::Tensor& stats, bool training) {
  const auto math = math_dtype(given_x);
  const at::Tensor dy = given_dy.to(math), x = given_x.to(math);
  const at::Tensor w = weight.defined() ? along_channels(weight.to(math), x) : at::ones({1}, x.options());
  const std::vector<int64_t> dims = all_but_channels(x);
  auto m = [&](const at::Tensor& v) { return v.mean(dims, /*keepdim=*/true); };

  const Standardised standardised = standardise(x, stats, training);
  const at::Tensor &xhat = standardised.xhat, &r = standardised.invstd;
  auto projected = [&](const at::Tensor& v) { return project(v, xhat, training); };

  // A term without a cotangent is left out, as 0 times infinity is no 0.
  const at::Tensor gx = given(to.dx) ? to.dx.to(math) : at::zeros_like(x);
  const at::Tensor projected_dy = projected(dy);
  at::Tensor to_dy = w * r * projected(gx), to_x;
  if (given(to.dweight)) {
    const at::Tensor gw = along_channels(to.dweight.to(math), x);
    to_dy = to_dy + gw * xhat;
    to_x = gw * r * projected_dy;
  }
  if (given(to.dbias)) to_dy = to_dy + along_channels(to.dbias.to(math), x);
  if (training) {
    const at::Tensor through_statistics =
        w * r * r *
        (xhat * m(gx * projected_dy) + m(dy * xhat) * projected(gx) + m(gx * xhat) * projected_dy);
    to_x = to_x.defined() ? to_x - through_statistics : -through_statistics;
  }
  BackwardInputs result;
  result.dy = to_dy.to(given_dy.scalar_type());
  if (to_x.defined()) result.x = to_x.to(given_x.scalar_type());
  if (weight.defined()) {
    result.weight = (gx * r * projected_dy).sum(dims).to(weight.scalar_type()).view_as(weight);
  }
  return result;
}

}  // namespace

// Backward is dz = activation_grad(dy, z), then what it is without an activation, of dz. So its derivative is
// that of the second step, its cotangent of dz (which is also dresidual) through the first to dy and z, and
// that of z = bn(x) + residual through another backward. A mask in place of z: nothing goes there.
BackwardInputs double_backward(const Cotangents& to, const BackwardInputs& given_inputs, bool training,
                               const ActivationSpec& activation) {
  const auto& [dy, x, residual, mask, weight, bias, stats] = given_inputs;
  if (!activation) return without_activation(to, dy, x, weight, stats, training);
  const auto math = math_dtype(x);
  at::Tensor z, wide_dy, dz;
  {
    const at::AutoGradMode enabled(true);
    wide_dy = dy.to(math);
    if (wide_dy.is_same(dy)) wide_dy = dy.view_as(dy);  // dy may be x, residual or what those come from
    if (!wide_dy.requires_grad()) wide_dy = differentiable_leaf(wide_dy);
    if (mask.defined()) {
      dz = masked_grad(activation, wide_dy, mask, x);
    } else {
      z = activation_input(standardise(x.to(math), stats, training).xhat, residual, weight, bias);
      if (!z.requires_grad()) z.requires_grad_();
      dz = activation_grad(activation, wide_dy, z);
    }
  }
  BackwardInputs result = without_activation(to, dz.to(dy.scalar_type()), x, weight, stats, training);
  const at::Tensor to_dz =
      given(to.dresidual) ? result.dy.to(math) + to.dresidual.to(math) : result.dy.to(math);
  const torch::autograd::variable_list sources =
      z.defined() ? torch::autograd::variable_list{wide_dy, z} : torch::autograd::variable_list{wide_dy};
  const auto through =
      torch::autograd::grad({dz}, sources, {to_dz}, /*retain_graph=*/true,
                            /*create_graph=*/at::GradMode::is_enabled(), /*allow_unused=*/true);
  result.dy = through[0].defined() ? through[0].to(dy.scalar_type()) : at::Tensor();
  if (!z.defined()) {
    if (bias.defined()) result.bias = at::zeros_like(bias);
    return result;
  }
  if (!through[1].defined()) return result;
  if (residual.defined()) result.residual = through[1].to(residual.scalar_type());
  const OptionalTensor w = weight.defined() ? OptionalTensor(weight) : std::nullopt;
  const auto [more_x, more_weight, to_bias, none] = backward_operator().call(
      through[1].to(x.scalar_type()), x, std::nullopt, std::nullopt, w, std::nullopt, stats, training,
      std::nullopt, std::nullopt, false, {true, weight.defined(), bias.defined(), false});
  result.x = result.x.defined() ? result.x + more_x : more_x;
  if (weight.defined()) result.weight = result.weight + more_weight.to(weight.scalar_type()).view_as(weight);
  if (bias.defined()) result.bias = to_bias.to(bias.scalar_type()).view_as(bias);
  return result;
}

}  // namespace bnext

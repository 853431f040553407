// Second and higher orders: rare, so clarity before speed.
#include "double_backward.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include "ops.h"

namespace bnext {
namespace {

// Shapes (C,) for broadcasting against x.
at::Tensor along_channels(const at::Tensor& v, const at::Tensor& x) {
  std::vector<c10::SymInt> sizes(x.dim(), 1);
  sizes[1] = x.sym_size(1);
  return v.reshape_symint(sizes);
}

std::vector<int64_t> all_but_channels(const at::Tensor& x) {
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d != 1) dims.push_back(d);
  }
  return dims;
}

// xhat and invstd, differentiable in x, so that derivatives of any order are right: the saved invstd is
// 1/sqrt(var + eps) at a constant eps, which var and invstd together determine.
std::pair<at::Tensor, at::Tensor> differentiable_xhat(const at::Tensor& x, const at::Tensor& stats,
                                                      bool training) {
  const auto math = x.scalar_type();
  const std::vector<int64_t> dims = all_but_channels(x);
  const at::Tensor saved_invstd = along_channels(stats.select(0, 1), x);
  at::Tensor r = saved_invstd.to(math);
  at::Tensor centered = x - along_channels(stats.select(0, 0), x).to(math);
  if (training) {
    centered = centered - centered.mean(dims, true);  // zero in value: carries the derivative of the mean
    const at::Tensor var = (centered * centered).mean(dims, true);
    const at::Tensor eps = (saved_invstd.pow(-2) - var.detach().to(at::kDouble)).to(math);
    r = (var + eps).rsqrt();
  }
  return {centered * r, r};
}

// dz = dy * act'(z), in operations that torch knows the derivatives of.
at::Tensor activation_grad(const ActivationSpec& activation, const at::Tensor& dy, const at::Tensor& z) {
  switch (activation.kind) {
    case Activation::none:
      return dy;
    case Activation::relu:
      return at::threshold_backward(dy, z, 0);
    case Activation::leaky_relu:
      return at::leaky_relu_backward(dy, z, activation.param, false);
    case Activation::relu6:
      return at::hardtanh_backward(dy, z, 0, 6);
    case Activation::silu: {  // at::silu_backward has no derivative
      const at::Tensor s = at::sigmoid(z);
      return dy * (s * (1 + z * (1 - s)));
    }
    case Activation::gelu:
      return at::gelu_backward(dy, z);
    case Activation::elu:
      return at::elu_backward(dy, activation.param, 1, 1, false, z);
    case Activation::hardswish:
      return at::hardswish_backward(dy, z);
    case Activation::sigmoid:
      return at::sigmoid_backward(dy, at::sigmoid(z));
    case Activation::tanh:
      return at::tanh_backward(dy, at::tanh(z));
  }
  return dy;
}

// Let P(v) = v - m(v) - xhat * m(v * xhat), m the mean over a channel, r = invstd; P is the projection behind
// dx = w r P(dy), self-adjoint, and r P(v) is the pull-back of v through xhat. For the cotangents gx, gw, gb
// of dx, dweight, dbias:
//   to dy:  w r P(gx) + gw xhat + gb
//   to w:   sum(gx * r P(dy))
//   to x:   -w r^2 (xhat m(gx * P(dy)) + m(dy xhat) P(gx) + m(gx xhat) P(dy)) + gw r P(dy)
// With fixed statistics P is the identity and r a constant: the first factor of the last line vanishes.
std::tuple<at::Tensor, at::Tensor, at::Tensor> without_activation(const std::array<at::Tensor, 3>& cotangents,
                                                                  const at::Tensor& given_dy,
                                                                  const at::Tensor& given_x,
                                                                  const at::Tensor& weight,
                                                                  const at::Tensor& stats, bool training) {
  const auto math = given_x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor dy = given_dy.to(math), x = given_x.to(math);
  const at::Tensor w = weight.defined() ? along_channels(weight.to(math), x) : at::ones({1}, x.options());
  const std::vector<int64_t> dims = all_but_channels(x);
  auto m = [&](const at::Tensor& v) { return v.mean(dims, /*keepdim=*/true); };

  const auto [xhat, r] = differentiable_xhat(x, stats, training);
  auto project = [&](const at::Tensor& v) { return training ? v - m(v) - xhat * m(v * xhat) : v; };

  const at::Tensor zero = at::zeros({1}, x.options());
  auto present = [](const at::Tensor& v) { return v.defined() && v.sym_numel() != 0; };
  const auto& [to_dx, to_dweight, to_dbias] = cotangents;
  const at::Tensor gx = present(to_dx) ? to_dx.to(math) : at::zeros_like(x);
  const at::Tensor gw = present(to_dweight) ? along_channels(to_dweight.to(math), x) : zero;
  const at::Tensor gb = present(to_dbias) ? along_channels(to_dbias.to(math), x) : zero;

  const at::Tensor projected_dy = project(dy);
  const at::Tensor to_dy = (w * r * project(gx) + gw * xhat + gb).to(given_dy.scalar_type());
  at::Tensor to_x = gw * r * projected_dy;
  if (training) {
    to_x =
        to_x -
        w * r * r * (xhat * m(gx * projected_dy) + m(dy * xhat) * project(gx) + m(gx * xhat) * projected_dy);
  }
  at::Tensor to_weight;
  if (weight.defined()) {
    to_weight = (gx * r * projected_dy).sum(dims).to(weight.scalar_type()).view_as(weight);
  }
  return {to_dy, to_x.to(given_x.scalar_type()), to_weight};
}

}  // namespace

// Backward is dz = activation_grad(dy, z), then what it is without an activation, of dz. So its derivative is
// that of the second step, its cotangent of dz through the first to dy and z, and that of z = bn(x) through
// another backward.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> double_backward(
    const std::array<at::Tensor, 3>& cotangents, const at::Tensor& dy, const at::Tensor& x,
    const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& stats, bool training,
    const ActivationSpec& activation) {
  if (!activation) {
    auto [to_dy, to_x, to_weight] = without_activation(cotangents, dy, x, weight, stats, training);
    return {to_dy, to_x, to_weight, {}};
  }
  const auto math = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor z, wide_dy, dz;
  {
    const at::AutoGradMode enabled(true);
    const at::Tensor wide = x.to(math);
    z = differentiable_xhat(wide, stats, training).first;
    if (weight.defined()) z = z * along_channels(weight.to(math), wide);
    if (bias.defined()) z = z + along_channels(bias.to(math), wide);
    if (!z.requires_grad()) z.requires_grad_();
    wide_dy = dy.to(math);
    if (!wide_dy.requires_grad()) wide_dy = wide_dy.detach().requires_grad_();
    dz = activation_grad(activation, wide_dy, z);
  }
  auto [to_dz, to_x, to_weight] =
      without_activation(cotangents, dz.to(dy.scalar_type()), x, weight, stats, training);
  const auto through =
      torch::autograd::grad({dz}, {wide_dy, z}, {to_dz.to(math)}, /*retain_graph=*/true,
                            /*create_graph=*/at::GradMode::is_enabled(), /*allow_unused=*/true);
  const at::Tensor to_dy = through[0].defined() ? through[0].to(dy.scalar_type()) : at::Tensor();
  if (!through[1].defined()) return {to_dy, to_x, to_weight, {}};
  const OptionalTensor w = weight.defined() ? OptionalTensor(weight) : std::nullopt;
  const auto [more_x, more_weight, to_bias] =
      backward_operator().call(through[1].to(x.scalar_type()), x, w, std::nullopt, stats, training,
                               std::nullopt, std::nullopt, {true, weight.defined(), bias.defined()});
  if (to_weight.defined()) to_weight = to_weight + more_weight.to(weight.scalar_type()).view_as(weight);
  return {to_dy, to_x + more_x, to_weight,
          bias.defined() ? to_bias.to(bias.scalar_type()).view_as(bias) : at::Tensor()};
}

}  // namespace bnext

// Second and higher orders: rare, so clarity before speed.
#include "double_backward.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>

#include "ops.h"

namespace bnext {
namespace {

bool given(const at::Tensor& cotangent) { return cotangent.defined() && cotangent.sym_numel() != 0; }

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

// Bits of the mask in x's shape.
at::Tensor bits(const at::Tensor& mask, const at::Tensor& x) {
  const at::Tensor powers = at::pow(2, at::arange(8, mask.options().dtype(at::kInt))).to(at::kByte);
  const at::Tensor flat =
      mask.unsqueeze(1).bitwise_and(powers).ne(0).flatten().narrow_symint(0, 0, x.sym_numel());
  if (memory_format_of(x) == at::MemoryFormat::Contiguous) return flat.view_symint(x.sym_sizes());
  std::vector<c10::SymInt> last = x.sym_sizes().vec();  // channels last
  std::rotate(last.begin() + 1, last.begin() + 2, last.end());
  return flat.view_symint(last).movedim(-1, 1);
}

// Let P(v) = v - m(v) - xhat * m(v * xhat), m the mean over a channel, r = invstd; P is the projection behind
// dx = w r P(dy), self-adjoint, and r P(v) is the pull-back of v through xhat. For the cotangents gx, gw, gb
// of dx, dweight, dbias:
//   to dy:  w r P(gx) + gw xhat + gb
//   to w:   sum(gx * r P(dy))
//   to x:   -w r^2 (xhat m(gx * P(dy)) + m(dy xhat) P(gx) + m(gx xhat) P(dy)) + gw r P(dy)
// With fixed statistics P is the identity and r a constant: the first factor of the last line vanishes.
BackwardInputs without_activation(const Cotangents& to, const at::Tensor& given_dy, const at::Tensor& given_x,
                                  const at::Tensor& weight, const at::Tensor& stats, bool training) {
  const auto math = given_x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor dy = given_dy.to(math), x = given_x.to(math);
  const at::Tensor w = weight.defined() ? along_channels(weight.to(math), x) : at::ones({1}, x.options());
  const std::vector<int64_t> dims = all_but_channels(x);
  auto m = [&](const at::Tensor& v) { return v.mean(dims, /*keepdim=*/true); };

  const auto [xhat, r] = differentiable_xhat(x, stats, training);
  auto project = [&](const at::Tensor& v) { return training ? v - m(v) - xhat * m(v * xhat) : v; };

  const at::Tensor zero = at::zeros({1}, x.options());
  const at::Tensor gx = given(to.dx) ? to.dx.to(math) : at::zeros_like(x);
  const at::Tensor gw = given(to.dweight) ? along_channels(to.dweight.to(math), x) : zero;
  const at::Tensor gb = given(to.dbias) ? along_channels(to.dbias.to(math), x) : zero;

  const at::Tensor projected_dy = project(dy);
  BackwardInputs result;
  result.dy = (w * r * project(gx) + gw * xhat + gb).to(given_dy.scalar_type());
  at::Tensor to_x = gw * r * projected_dy;
  if (training) {
    to_x =
        to_x -
        w * r * r * (xhat * m(gx * projected_dy) + m(dy * xhat) * project(gx) + m(gx * xhat) * projected_dy);
  }
  result.x = to_x.to(given_x.scalar_type());
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
  const auto math = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor z, wide_dy, dz;
  {
    const at::AutoGradMode enabled(true);
    wide_dy = dy.to(math);
    if (!wide_dy.requires_grad()) wide_dy = wide_dy.detach().requires_grad_();
    if (mask.defined()) {
      const at::Tensor blocked =
          activation.kind == Activation::leaky_relu ? wide_dy * activation.param : at::zeros_like(wide_dy);
      dz = at::where(bits(mask, x), wide_dy, blocked);
    } else {
      const at::Tensor wide = x.to(math);
      z = differentiable_xhat(wide, stats, training).first;
      if (weight.defined()) z = z * along_channels(weight.to(math), wide);
      if (bias.defined()) z = z + along_channels(bias.to(math), wide);
      if (residual.defined()) z = z + residual.to(math);
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
  if (through.size() < 2 || !through[1].defined()) return result;
  if (residual.defined()) result.residual = through[1].to(residual.scalar_type());
  const OptionalTensor w = weight.defined() ? OptionalTensor(weight) : std::nullopt;
  const auto [more_x, more_weight, to_bias, none] = backward_operator().call(
      through[1].to(x.scalar_type()), x, std::nullopt, std::nullopt, w, std::nullopt, stats, training,
      std::nullopt, std::nullopt, false, {true, weight.defined(), bias.defined(), false});
  result.x = result.x + more_x;
  if (weight.defined()) result.weight = result.weight + more_weight.to(weight.scalar_type()).view_as(weight);
  if (bias.defined()) result.bias = to_bias.to(bias.scalar_type()).view_as(bias);
  return result;
}

}  // namespace bnext

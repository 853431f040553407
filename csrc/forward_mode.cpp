// Tangents by calls that can be differentiated further, in either mode.
#include "forward_mode.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros.h>

#include "composed.h"

namespace bnext {
namespace {

OptionalTensor primal(const OptionalTensor& t) {
  return present(t) ? OptionalTensor(t->_fw_primal(/*level=*/0)) : std::nullopt;
}

OptionalTensor tangent(const OptionalTensor& t) {
  if (!present(t)) return std::nullopt;
  const at::Tensor& found = t->_fw_grad(/*level=*/0);
  return found.defined() ? OptionalTensor(found) : std::nullopt;
}

}  // namespace

// y = act(z). x's part in the tangent of z is w r P(tx), what backward makes of a gradient tx (see
// project()); that of the weight is xhat times its tangent.
at::Tensor forward_tangent(const at::Tensor& dual_x, const OptionalTensor& residual,
                           const OptionalTensor& dual_weight, const OptionalTensor& bias,
                           const at::Tensor& stats, bool training, const ActivationSpec& activation) {
  const at::Tensor x = dual_x._fw_primal(/*level=*/0);
  const auto math = math_dtype(x);
  const OptionalTensor weight = primal(dual_weight);
  const OptionalTensor x_tangent = tangent(dual_x), weight_tangent = tangent(dual_weight),
                       bias_tangent = tangent(bias), residual_tangent = tangent(residual);
  at::Tensor xhat;
  if (weight_tangent || activation) xhat = standardise(x.to(math), stats, training).xhat;
  at::Tensor dz = at::zeros({1}, x.options().dtype(math)).expand_symint(x.sym_sizes());
  if (x_tangent) {
    const auto [from_x, no_weight, no_bias, no_residual] = backward_operator().call(
        *x_tangent, x, std::nullopt, std::nullopt, weight, std::nullopt, stats, training, std::nullopt,
        std::nullopt, /*from_output=*/false, {true, false, false, false});
    dz = from_x.to(math);
  }
  if (weight_tangent) dz = dz + xhat * along_channels(weight_tangent->to(math), x);
  if (bias_tangent) dz = dz + along_channels(bias_tangent->to(math), x);
  if (residual_tangent) dz = dz + residual_tangent->to(math);
  if (activation) {
    dz = activation_grad(activation, dz, activation_input(xhat, primal(residual), weight, primal(bias)));
  }
  return dz.to(x.scalar_type());
}

// In operations that carry tangents along, of which the values are dropped.
BackwardResult backward_tangents(const BackwardCall& call) {
  const at::Tensor& x = call.x;
  const auto math = math_dtype(x);
  const Standardised s = standardise(x.to(math), call.stats, call.training);
  at::Tensor dz = call.dy.to(math);
  if (present(call.mask)) {
    dz = masked_grad(call.activation, dz, *call.mask, x);
  } else if (call.activation) {
    dz =
        activation_grad(call.activation, dz, activation_input(s.xhat, call.residual, call.weight, call.bias));
  }
  const std::vector<int64_t> dims = all_but_channels(x);
  const auto [wants_dx, wants_dweight, wants_dbias, wants_dresidual] = call.output_mask;
  const auto tangent_of = [](bool wanted, const auto& compute) {
    return wanted ? tangent(compute()).value_or(at::Tensor()) : at::Tensor();
  };
  const auto parameter = [&](const at::Tensor& v) { return v.sum(dims).to(math); };
  return {tangent_of(wants_dx,
                     [&] {
                       const at::Tensor dx = s.invstd * project(dz, s.xhat, call.training);
                       return (present(call.weight) ? dx * along_channels(call.weight->to(math), x) : dx)
                           .to(x.scalar_type());
                     }),
          tangent_of(wants_dweight, [&] { return parameter(dz * s.xhat); }),
          tangent_of(wants_dbias, [&] { return parameter(dz); }),
          tangent_of(wants_dresidual, [&] { return dz.to(x.scalar_type()); })};
}

}  // namespace bnext

// Each formula in torch operations, once.
#include "composed.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace bnext {
namespace {

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

}  // namespace

bool is_empty(const at::Tensor& t) { return TORCH_GUARD_OR_FALSE(t.sym_numel().sym_eq(0)); }

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

Standardised standardise(const at::Tensor& wide_x, const at::Tensor& stats, bool training) {
  const auto math = wide_x.scalar_type();
  const at::Tensor saved_invstd = along_channels(stats.select(0, 1), wide_x).to(math);
  const at::Tensor xhat = (wide_x - along_channels(stats.select(0, 0), wide_x).to(math)) * saved_invstd;
  if (!training || is_empty(wide_x)) return {xhat, saved_invstd};
  const std::vector<int64_t> dims = all_but_channels(wide_x);
  const at::Tensor centered = xhat - xhat.mean(dims, true);
  const at::Tensor var = (centered * centered).mean(dims, true);
  const at::Tensor factor = (var + (1 - var.detach())).rsqrt();
  return {centered * factor, saved_invstd * factor};
}

at::Tensor project(const at::Tensor& v, const at::Tensor& xhat, bool training) {
  if (!training || is_empty(v)) return v;
  const std::vector<int64_t> dims = all_but_channels(xhat);
  return v - v.mean(dims, /*keepdim=*/true) - xhat * (v * xhat).mean(dims, /*keepdim=*/true);
}

at::Tensor activation_input(const at::Tensor& xhat, const OptionalTensor& residual,
                            const OptionalTensor& weight, const OptionalTensor& bias) {
  const auto math = xhat.scalar_type();
  at::Tensor z = xhat;
  if (present(weight)) z = z * along_channels(weight->to(math), xhat);
  if (present(bias)) z = z + along_channels(bias->to(math), xhat);
  if (present(residual)) z = z + residual->to(math);
  return z;
}

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

at::Tensor masked_grad(const ActivationSpec& activation, const at::Tensor& dy, const at::Tensor& mask,
                       const at::Tensor& x) {
  const at::Tensor blocked =
      activation.kind == Activation::leaky_relu ? dy * activation.param : at::zeros_like(dy);
  return at::where(bits(mask, x), dy, blocked);
}

}  // namespace bnext

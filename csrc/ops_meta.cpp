// What the operators return, without the values: for torch.compile, export and fake tensors.
#include <ATen/ops/empty.h>

#include "calls.h"

namespace bnext {
namespace {

at::Tensor shaped_like(const at::Tensor& x) {
  return at::empty_symint(x.sym_sizes(), x.options(), memory_format_of(x));
}

at::Tensor stats_of(const ForwardCall& call) {
  return at::empty_symint({call.stats_rows(), call.x.sym_size(1)}, call.x.options().dtype(at::kDouble));
}

}  // namespace

ForwardResult forward_meta(const ForwardCall& call) {
  call.check();
  const at::Tensor& x = call.x;
  return {shaped_like(x), stats_of(call),
          at::empty_symint({call.mask_size(x.sym_numel())}, x.options().dtype(at::kByte))};
}

at::Tensor inplace_meta(const ForwardCall& call) {
  call.check();
  require_invertible(call.activation, call.x.scalar_type());
  require_writable(call.x);
  return stats_of(call);
}

BackwardResult backward_meta(const BackwardCall& call) {
  call.check();
  const at::Tensor& x = call.x;
  auto vector = [&](bool wanted, const c10::SymInt& size, at::ScalarType dtype) {
    return at::empty_symint({wanted ? size : c10::SymInt(0)}, x.options().dtype(dtype));
  };
  auto like_x = [&](bool wanted) { return wanted ? shaped_like(x) : vector(false, 0, x.scalar_type()); };
  auto per_channel = [&](bool wanted) { return vector(wanted, x.sym_size(1), math_dtype(x)); };
  const auto& wanted = call.output_mask;
  return {like_x(wanted[0]), per_channel(wanted[1]), per_channel(wanted[2]), like_x(wanted[3])};
}

}  // namespace bnext

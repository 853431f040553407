// The operators' implementations: check, allocate, run.
#include "ops.h"

#include "dense.h"
#include "engine.h"

namespace bnext {

Extent extent_of(at::IntArrayRef sizes, bool channels_last) {
  int64_t inner = 1;
  for (size_t d = 2; d < sizes.size(); ++d) inner *= sizes[d];
  return channels_last ? Extent{sizes[0] * inner, sizes[1], 1} : Extent{sizes[0], sizes[1], inner};
}

Dtype dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return Dtype::float64;
    case at::kBFloat16:
      return Dtype::bfloat16;
    case at::kHalf:
      return Dtype::float16;
    default:
      return Dtype::float32;
  }
}

at::ScalarType math_dtype(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

const c10::TypedOperatorHandle<ForwardSignature>& forward_operator() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("bnext::batch_norm", "").typed<ForwardSignature>();
  return op;
}

const c10::TypedOperatorHandle<NoUpdateSignature>& no_update_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("bnext::batch_norm_no_update", "")
                             .typed<NoUpdateSignature>();
  return op;
}

const c10::TypedOperatorHandle<InplaceSignature>& inplace_operator() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("bnext::batch_norm_", "").typed<InplaceSignature>();
  return op;
}

const c10::TypedOperatorHandle<BackwardSignature>& backward_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("bnext::batch_norm_backward", "")
                             .typed<BackwardSignature>();
  return op;
}

at::MemoryFormat memory_format_of(const at::Tensor& x) {
  if (x.is_contiguous()) return at::MemoryFormat::Contiguous;
  if (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast)) return at::MemoryFormat::ChannelsLast;
  if (x.dim() == 5 && x.is_contiguous(at::MemoryFormat::ChannelsLast3d))
    return at::MemoryFormat::ChannelsLast3d;
  return at::MemoryFormat::Contiguous;
}

ForwardResult forward_dense(const ForwardCall& call) {
  call.check();
  require_engine(call.x);
  const Input input(call.x);
  at::Tensor y = empty_output(input.dense, input.format);
  at::Tensor mask = empty_vector({call.mask_size(call.x.numel())}, at::kByte, call.x);
  at::Tensor stats = run_forward(call, input, y, mask);
  return {y, stats, mask};
}

at::Tensor inplace_dense(const ForwardCall& call) {
  const at::Tensor& x = call.x;
  call.check();
  require_invertible(call.activation, x.scalar_type());
  require_engine(x);
  if (call.for_backward) require_recoverable(call.weight);
  require_writable(x);
  const Input input(x);
  at::Tensor stats = run_forward(call, input, input.dense, empty_vector({0}, at::kByte, x));
  if (!input.dense.is_same(x)) x.copy_(input.dense);
  return stats;
}

BackwardResult backward_dense(const BackwardCall& call) {
  call.check();
  require_engine(call.x);
  return run_backward(call, Input(call.x), call.training ? Pass::backward : Pass::frozen_backward);
}

}  // namespace bnext

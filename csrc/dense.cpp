// Allocates what a call gives, fills in its plain arguments, and runs it.
#include "dense.h"

#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include "engine.h"

namespace bnext {

Input::Input(const at::Tensor& x)
    : format(memory_format_of(x)),
      dense(x.contiguous(format)),
      extent(extent_of(x.sizes(), /*channels_last=*/format != at::MemoryFormat::Contiguous)) {}

namespace {

// A per-channel argument as the kernels see it. A strided one that is written to is copied back by finish().
struct Parameter {
  at::Tensor original;
  at::Tensor dense;

  explicit Parameter(const OptionalTensor& t) {
    if (!present(t)) return;
    original = *t;
    dense = original.contiguous();
  }
  ChannelVector vector() const {
    return dense.defined() ? ChannelVector{dense.data_ptr(), dtype_of(dense.scalar_type())} : ChannelVector{};
  }
  void finish() const {
    if (!dense.is_same(original)) original.copy_(dense);
  }
};

at::Tensor dense_like(const Input& input, const OptionalTensor& t) {
  return present(t) ? t->contiguous(input.format) : at::Tensor();
}

const void* pointer(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

}  // namespace

at::Tensor run_forward(const ForwardCall& call, const Input& input, const at::Tensor& y,
                       const at::Tensor& mask) {
  const at::Tensor& x = input.dense;
  const at::Tensor residual = dense_like(input, call.residual);
  const Parameter w(call.weight), b(call.bias), mean(call.running_mean), var(call.running_var);
  at::Tensor stats = empty_vector({call.stats_rows(), x.size(1)}, at::kDouble, x);
  ForwardArgs args;
  args.extent = input.extent;
  args.dtype = dtype_of(x.scalar_type());
  args.x = x.const_data_ptr();
  args.residual = pointer(residual);
  args.y = y.data_ptr();
  args.mask = mask.numel() == 0 ? nullptr : mask.data_ptr();
  args.weight = w.vector();
  args.bias = b.vector();
  args.running_mean = mean.vector();
  args.running_var = var.vector();
  if (call.training && present(call.num_batches_tracked))
    args.num_batches_tracked = call.num_batches_tracked->data_ptr<int64_t>();
  args.mean = stats.data_ptr<double>();
  args.invstd = args.mean + x.size(1);
  if (call.for_backward) args.kept = args.mean + kKeptWeight * x.size(1);
  args.eps = call.eps;
  args.momentum = call.momentum.value_or(0.0);
  args.cumulative = !call.momentum.has_value();
  args.batch_statistics = call.training;
  args.unbiased_running_var = call.unbiased_running_var;
  args.skip_nonfinite = call.skip_nonfinite;
  args.activation = call.activation;
  run(args, call.training ? Pass::forward : Pass::inference, x);
  if (call.for_backward && x.numel() == 0) {  // no kernel walks its channels
    stats.select(0, kKeptWeight)
        .copy_(present(call.weight) ? call.weight->reshape({-1}) : at::ones({}, stats.options()));
    stats.select(0, kKeptBias)
        .copy_(present(call.bias) ? call.bias->reshape({-1}) : at::zeros({}, stats.options()));
  }
  if (call.training) {
    mean.finish();
    var.finish();
  }
  return stats;
}

BackwardResult run_backward(const BackwardCall& call, const Input& input, Pass pass, Sums* sums_out,
                            const Sums* sums_in) {
  const at::Tensor& x = call.x;
  const std::array<bool, 4>& wanted = call.output_mask;
  const at::Tensor dense_dy = call.dy.contiguous(input.format), dense_stats = call.stats.contiguous();
  const at::Tensor dense_residual = dense_like(input, call.residual);
  const at::Tensor dense_mask = present(call.mask) ? call.mask->contiguous() : at::Tensor();
  const Parameter w(call.weight), b(call.bias);
  auto like_x = [&](bool some, Output which = Output::first) {
    return some ? empty_output(input.dense, input.format, which) : empty_vector({0}, x.scalar_type(), x);
  };
  auto per_channel = [&](bool some) { return empty_vector({some ? x.size(1) : 0}, math_dtype(x), x); };
  at::Tensor dx = like_x(wanted[0] || wanted[3]), dresidual = like_x(wanted[3], Output::second);
  at::Tensor dweight = per_channel(wanted[1]), dbias = per_channel(wanted[2]);

  BackwardArgs args;
  args.extent = input.extent;
  args.dtype = dtype_of(x.scalar_type());
  args.x = input.dense.const_data_ptr();
  args.dy = dense_dy.const_data_ptr();
  args.residual = pointer(dense_residual);
  args.mask = pointer(dense_mask);
  args.dx = wanted[0] || wanted[3] ? dx.data_ptr() : nullptr;
  args.dresidual = wanted[3] ? dresidual.data_ptr() : nullptr;
  args.weight = w.vector();
  args.bias = b.vector();
  args.activation = call.activation;
  args.mean = dense_stats.const_data_ptr<double>();
  args.invstd = args.mean + x.size(1);
  args.dweight = wanted[1] ? dweight.data_ptr() : nullptr;
  args.dbias = wanted[2] ? dbias.data_ptr() : nullptr;
  args.sums_out = sums_out;
  args.sums_in = sums_in;
  args.batch_statistics = call.training;
  args.from_output = call.from_output;
  if (wanted != std::array<bool, 4>{}) run(args, pass, x);
  if (!wanted[0]) dx = like_x(false);  // made for the map that gives dresidual
  return {dx, dweight, dbias, dresidual};
}

}  // namespace bnext

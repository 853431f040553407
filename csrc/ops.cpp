// Tensor level: check, extent, allocate, launch.
#include "ops.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include "checks.h"
#include "engine.h"

namespace bnext {

Extent extent_of(at::IntArrayRef sizes, Layout layout) {
  int64_t inner = 1;
  for (size_t d = 2; d < sizes.size(); ++d) inner *= sizes[d];
  return layout == Layout::channels_last ? Extent{sizes[0] * inner, sizes[1], 1}
                                         : Extent{sizes[0], sizes[1], inner};
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

const c10::TypedOperatorHandle<ForwardSignature>& forward_operator() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("bnext::batch_norm", "").typed<ForwardSignature>();
  return op;
}

const c10::TypedOperatorHandle<BackwardSignature>& backward_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("bnext::batch_norm_backward", "")
                             .typed<BackwardSignature>();
  return op;
}

namespace {

at::MemoryFormat memory_format_of(const at::Tensor& x) {
  if (x.is_contiguous()) return at::MemoryFormat::Contiguous;
  if (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast)) return at::MemoryFormat::ChannelsLast;
  if (x.dim() == 5 && x.is_contiguous(at::MemoryFormat::ChannelsLast3d))
    return at::MemoryFormat::ChannelsLast3d;
  return at::MemoryFormat::Contiguous;
}

// x in an order the kernels can walk, the order itself, and its extent.
struct Input {
  at::MemoryFormat format;
  at::Tensor dense;
  Extent extent;

  explicit Input(const at::Tensor& x)
      : format(memory_format_of(x)),
        dense(x.contiguous(format)),
        extent(extent_of(x.sizes(), format == at::MemoryFormat::Contiguous ? Layout::contiguous
                                                                           : Layout::channels_last)) {}
};

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
  void require_writable() const {
    if (original.defined()) at::assert_no_internal_overlap(original);
  }
  void finish() const {
    if (!dense.is_same(original)) original.copy_(dense);
  }
};

void check_forward(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& running_mean, const OptionalTensor& running_var,
                   const OptionalTensor& num_batches_tracked, bool training, double eps,
                   at::IntArrayRef ndims) {
  require_input(x, ndims);
  if (training) require_enough_values(x);
  require_eps(eps, training);
  require_running_pair(running_mean, running_var, training);
  ParameterDtype dtypes{x};
  const std::pair<const char*, const OptionalTensor&> vectors[] = {
      {"running_mean", running_mean}, {"running_var", running_var}, {"weight", weight}, {"bias", bias}};
  for (const auto& [name, vector] : vectors) require_channel_vector(name, vector, x);
  for (const auto& [name, vector] : vectors) dtypes.require(name, vector);
  require_counter(num_batches_tracked, x);
}

void check_backward(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
                    const OptionalTensor& bias, const at::Tensor& stats) {
  require_input(x, {});
  require_gradient(dy, x);
  ParameterDtype dtypes{x};
  for (const auto& [name, vector] : {std::pair<const char*, const OptionalTensor&>("weight", weight),
                                     std::pair<const char*, const OptionalTensor&>("bias", bias)}) {
    require_channel_vector(name, vector, x);
    dtypes.require(name, vector);
  }
  require_statistics(stats, x);
}

at::ScalarType parameter_grad_dtype(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace

ForwardResult batch_norm_dense(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& running_mean, const OptionalTensor& running_var,
                               const OptionalTensor& num_batches_tracked, bool training,
                               std::optional<double> momentum, double eps, bool unbiased_running_var,
                               at::IntArrayRef ndims, ActivationName activation,
                               std::optional<double> activation_param) {
  const ActivationSpec act = require_activation(activation, activation_param);
  check_forward(x, weight, bias, running_mean, running_var, num_batches_tracked, training, eps, ndims);
  require_engine(x);
  const Parameter w(weight), b(bias), mean(running_mean), var(running_var);
  if (training) {
    mean.require_writable();
    var.require_writable();
  }
  const Input input(x);
  at::Tensor y = empty_output(input.dense, input.format);
  at::Tensor stats = empty_vector({2, x.size(1)}, at::kDouble, x);

  ForwardArgs args;
  args.extent = input.extent;
  args.dtype = dtype_of(x.scalar_type());
  args.x = input.dense.const_data_ptr();
  args.y = y.data_ptr();
  args.weight = w.vector();
  args.bias = b.vector();
  args.running_mean = mean.vector();
  args.running_var = var.vector();
  if (training && present(num_batches_tracked))
    args.num_batches_tracked = num_batches_tracked->data_ptr<int64_t>();
  args.mean = stats.data_ptr<double>();
  args.invstd = args.mean + x.size(1);
  args.eps = eps;
  args.momentum = momentum.value_or(0.0);
  args.cumulative = !momentum.has_value();
  args.batch_statistics = training;
  args.unbiased_running_var = unbiased_running_var;
  args.activation = act;
  run(args, training ? Pass::forward : Pass::inference, x);
  if (training) {
    mean.finish();
    var.finish();
  }
  return {y, stats};
}

BackwardResult batch_norm_backward_dense(const at::Tensor& dy, const at::Tensor& x,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         const at::Tensor& stats, bool training, ActivationName activation,
                                         std::optional<double> activation_param,
                                         std::array<bool, 3> output_mask) {
  const ActivationSpec act = require_activation(activation, activation_param);
  check_backward(dy, x, weight, bias, stats);
  require_engine(x);
  const Input input(x);
  const at::Tensor dense_dy = dy.contiguous(input.format), dense_stats = stats.contiguous();
  const Parameter w(weight), b(bias);
  auto per_channel = [&](bool wanted) -> at::Tensor {
    return empty_vector({wanted ? x.size(1) : 0}, parameter_grad_dtype(x), x);
  };
  at::Tensor dx =
      output_mask[0] ? empty_output(input.dense, input.format) : empty_vector({0}, x.scalar_type(), x);
  at::Tensor dweight = per_channel(output_mask[1]), dbias = per_channel(output_mask[2]);

  BackwardArgs args;
  args.extent = input.extent;
  args.dtype = dtype_of(x.scalar_type());
  args.x = input.dense.const_data_ptr();
  args.dy = dense_dy.const_data_ptr();
  args.dx = output_mask[0] ? dx.data_ptr() : nullptr;
  args.weight = w.vector();
  args.bias = b.vector();
  args.activation = act;
  args.mean = dense_stats.const_data_ptr<double>();
  args.invstd = args.mean + x.size(1);
  args.dweight = output_mask[1] ? dweight.data_ptr() : nullptr;
  args.dbias = output_mask[2] ? dbias.data_ptr() : nullptr;
  args.batch_statistics = training;
  if (output_mask[0] || output_mask[1] || output_mask[2]) {
    run(args, training ? Pass::backward : Pass::frozen_backward, x);
  }
  return {dx, dweight, dbias};
}

ForwardResult batch_norm_meta(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& running_mean, const OptionalTensor& running_var,
                              const OptionalTensor& num_batches_tracked, bool training, std::optional<double>,
                              double eps, bool, at::IntArrayRef ndims, ActivationName activation,
                              std::optional<double> activation_param) {
  require_activation(activation, activation_param);
  check_forward(x, weight, bias, running_mean, running_var, num_batches_tracked, training, eps, ndims);
  return {at::empty_symint(x.sym_sizes(), x.options(), memory_format_of(x)),
          at::empty_symint({2, x.sym_size(1)}, x.options().dtype(at::kDouble))};
}

BackwardResult batch_norm_backward_meta(const at::Tensor& dy, const at::Tensor& x,
                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                        const at::Tensor& stats, bool, ActivationName activation,
                                        std::optional<double> activation_param,
                                        std::array<bool, 3> output_mask) {
  require_activation(activation, activation_param);
  check_backward(dy, x, weight, bias, stats);
  const auto options = x.options().dtype(parameter_grad_dtype(x));
  auto per_channel = [&](bool wanted) {
    return at::empty_symint({wanted ? x.sym_size(1) : c10::SymInt(0)}, options);
  };
  at::Tensor dx = output_mask[0] ? at::empty_symint(x.sym_sizes(), x.options(), memory_format_of(x))
                                 : at::empty_symint({0}, x.options());
  return {dx, per_channel(output_mask[1]), per_channel(output_mask[2])};
}

}  // namespace bnext

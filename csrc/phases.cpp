// The phases as calls of the engines: a forward without output, one with given statistics, a backward without
// dx, one with given sums.
#include "phases.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include "dense.h"
#include "engine.h"

namespace bnext {
namespace {

const OptionalTensor kNone;

// x as a call without output sees it.
ForwardArgs input_args(const Input& input) {
  ForwardArgs args;
  args.extent = input.extent;
  args.dtype = dtype_of(input.dense.scalar_type());
  args.x = input.dense.const_data_ptr();
  args.batch_statistics = true;
  return args;
}

// f(call) of an inference with these moments for running statistics.
template <class F>
ForwardResult with_moments(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                           const OptionalTensor& bias, const at::Tensor& moments, double eps,
                           ActivationName activation, std::optional<double> activation_param,
                           bool for_backward, F f) {
  require_input(x, {});
  require_moments(moments, x);
  const OptionalTensor mean = moments.select(0, 0), var = moments.select(0, 1);
  return f(ForwardCall{x,
                       residual,
                       weight,
                       bias,
                       mean,
                       var,
                       kNone,
                       /*training=*/false,
                       0.0,
                       eps,
                       true,
                       {},
                       require_activation(activation, activation_param),
                       for_backward,
                       /*skip_nonfinite=*/false,
                       /*exact_statistics=*/true});
}

// What a training call with these arguments has to have, but for others' values.
void require_training(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                      const OptionalTensor& bias, const OptionalTensor& running_mean,
                      const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                      double eps, ActivationName activation, std::optional<double> activation_param) {
  TORCH_CHECK(x.defined(), "expected input to be a tensor, but got None");
  ForwardCall call{x,
                   residual,
                   weight,
                   bias,
                   running_mean,
                   running_var,
                   num_batches_tracked,
                   /*training=*/true,
                   0.0,
                   eps,
                   true,
                   {},
                   require_activation(activation, activation_param),
                   /*for_backward=*/false,
                   /*skip_nonfinite=*/false};
  call.alone = false;
  call.check();
  require_not_differentiable("running_mean", running_mean);
  require_not_differentiable("running_var", running_var);
}

BackwardCall backward_call(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& residual,
                           const OptionalTensor& mask, const OptionalTensor& weight,
                           const OptionalTensor& bias, const at::Tensor& stats, ActivationName activation,
                           std::optional<double> activation_param, std::array<bool, 4> wanted) {
  return {dy,
          x,
          residual,
          mask,
          weight,
          bias,
          stats,
          /*training=*/true,
          require_activation(activation, activation_param),
          /*from_output=*/false,
          wanted};
}

constexpr std::array<bool, 4> kSums{false, true, true, false};

std::array<bool, 4> wanted_of(std::array<bool, 2> output_mask) {
  return {output_mask[0], false, false, output_mask[1]};
}

// Where a kernel may read pairs of numbers at once.
at::Tensor on_pairs(const at::Tensor& t) {
  at::Tensor dense = t.contiguous();
  const bool aligned = reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % (2 * sizeof(double)) == 0;
  return aligned ? dense : dense.clone();
}

}  // namespace

at::Tensor moments_dense(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& running_mean,
                         const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                         double eps, ActivationName activation, std::optional<double> activation_param) {
  require_training(x, residual, weight, bias, running_mean, running_var, num_batches_tracked, eps, activation,
                   activation_param);
  for (const OptionalTensor& running : {running_mean, running_var}) {
    if (present(running)) at::assert_no_internal_overlap(*running);
  }
  require_engine(x);
  const Input input(x);
  const int64_t channels = x.size(1);
  at::Tensor moments = empty_vector({2, channels}, at::kDouble, x);
  const at::Tensor invstd = empty_vector({channels}, at::kDouble, x);  // nobody asks for
  ForwardArgs args = input_args(input);
  args.mean = moments.data_ptr<double>();
  args.var = args.mean + channels;
  args.invstd = invstd.data_ptr<double>();
  run(args, Pass::forward, input.dense);
  return moments;
}

at::Tensor moments_meta(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& running_mean,
                        const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                        double eps, ActivationName activation, std::optional<double> activation_param) {
  require_training(x, residual, weight, bias, running_mean, running_var, num_batches_tracked, eps, activation,
                   activation_param);
  return at::empty_symint({2, x.sym_size(1)}, x.options().dtype(at::kDouble));
}

ForwardResult normalize_dense(const at::Tensor& x, const OptionalTensor& residual,
                              const OptionalTensor& weight, const OptionalTensor& bias,
                              const at::Tensor& moments, double eps, ActivationName activation,
                              std::optional<double> activation_param, bool for_backward) {
  return with_moments(x, residual, weight, bias, moments, eps, activation, activation_param, for_backward,
                      forward_dense);
}

ForwardResult normalize_meta(const at::Tensor& x, const OptionalTensor& residual,
                             const OptionalTensor& weight, const OptionalTensor& bias,
                             const at::Tensor& moments, double eps, ActivationName activation,
                             std::optional<double> activation_param, bool for_backward) {
  return with_moments(x, residual, weight, bias, moments, eps, activation, activation_param, for_backward,
                      forward_meta);
}

GradSumsResult grad_sums_dense(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& residual,
                               const OptionalTensor& mask, const OptionalTensor& weight,
                               const OptionalTensor& bias, const at::Tensor& stats, ActivationName activation,
                               std::optional<double> activation_param) {
  const BackwardCall call =
      backward_call(dy, x, residual, mask, weight, bias, stats, activation, activation_param, kSums);
  call.check();
  require_engine(x);
  at::Tensor sums = empty_vector({x.size(1), 2}, at::kDouble, x);
  auto [dx, dweight, dbias, dresidual] =
      run_backward(call, Input(x), Pass::backward, reinterpret_cast<Sums*>(sums.data_ptr<double>()));
  return {sums, dweight, dbias};
}

GradSumsResult grad_sums_meta(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& residual,
                              const OptionalTensor& mask, const OptionalTensor& weight,
                              const OptionalTensor& bias, const at::Tensor& stats, ActivationName activation,
                              std::optional<double> activation_param) {
  auto [dx, dweight, dbias, dresidual] = backward_meta(
      backward_call(dy, x, residual, mask, weight, bias, stats, activation, activation_param, kSums));
  return {at::empty_symint({x.sym_size(1), 2}, x.options().dtype(at::kDouble)), dweight, dbias};
}

InputGradResult input_grad_dense(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& residual,
                                 const OptionalTensor& mask, const OptionalTensor& weight,
                                 const OptionalTensor& bias, const at::Tensor& stats, const at::Tensor& sums,
                                 ActivationName activation, std::optional<double> activation_param,
                                 std::array<bool, 2> output_mask) {
  const BackwardCall call = backward_call(dy, x, residual, mask, weight, bias, stats, activation,
                                          activation_param, wanted_of(output_mask));
  call.check();
  require_sums(sums, x);
  require_engine(x);
  const at::Tensor given = on_pairs(sums);
  auto [dx, dweight, dbias, dresidual] =
      run_backward(call, Input(x), Pass::input_grad, nullptr,
                   reinterpret_cast<const Sums*>(given.const_data_ptr<double>()));
  return {dx, dresidual};
}

InputGradResult input_grad_meta(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& residual,
                                const OptionalTensor& mask, const OptionalTensor& weight,
                                const OptionalTensor& bias, const at::Tensor& stats, const at::Tensor& sums,
                                ActivationName activation, std::optional<double> activation_param,
                                std::array<bool, 2> output_mask) {
  require_sums(sums, x);
  auto [dx, dweight, dbias, dresidual] = backward_meta(backward_call(
      dy, x, residual, mask, weight, bias, stats, activation, activation_param, wanted_of(output_mask)));
  return {dx, dresidual};
}

}  // namespace bnext

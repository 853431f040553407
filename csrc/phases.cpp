// The phases as calls of the engines: a forward without output, one with given statistics, a backward without
// dx, one with given sums.
#include "phases.h"

#include <ATen/ops/empty.h>

#include "dense.h"
#include "engine.h"

namespace bnext {
namespace {

// Where a kernel may read pairs of numbers at once.
at::Tensor on_pairs(const at::Tensor& t) {
  at::Tensor dense = t.contiguous();
  const bool aligned = reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % (2 * sizeof(double)) == 0;
  return aligned ? dense : dense.clone();
}

}  // namespace

at::Tensor moments_dense(const ForwardCall& call) {
  const at::Tensor& x = call.x;
  require_engine(x);
  const Input input(x);
  const int64_t channels = x.size(1);
  at::Tensor moments = empty_vector({2, channels}, at::kDouble, x);
  const at::Tensor invstd = empty_vector({channels}, at::kDouble, x);  // written, not read
  ForwardArgs args;
  args.extent = input.extent;
  args.dtype = dtype_of(x.scalar_type());
  args.x = input.dense.const_data_ptr();
  args.batch_statistics = true;
  args.mean = moments.data_ptr<double>();
  args.var = args.mean + channels;
  args.invstd = invstd.data_ptr<double>();
  run(args, Pass::forward, input.dense);
  return moments;
}

at::Tensor moments_meta(const ForwardCall& call) {
  return at::empty_symint({2, call.x.sym_size(1)}, call.x.options().dtype(at::kDouble));
}

GradSumsResult grad_sums_dense(const BackwardCall& call) {
  const at::Tensor& x = call.x;
  call.check();
  require_engine(x);
  at::Tensor sums = empty_vector({x.size(1), 2}, at::kDouble, x);
  auto [dx, dweight, dbias, dresidual] =
      run_backward(call, Input(x), Pass::backward, reinterpret_cast<Sums*>(sums.data_ptr<double>()));
  return {sums, dweight, dbias};
}

GradSumsResult grad_sums_meta(const BackwardCall& call) {
  auto [dx, dweight, dbias, dresidual] = backward_meta(call);
  const at::Tensor& x = call.x;
  return {at::empty_symint({x.sym_size(1), 2}, x.options().dtype(at::kDouble)), dweight, dbias};
}

InputGradResult input_grad_dense(const BackwardCall& call, const at::Tensor& sums) {
  call.check();
  require_sums(sums, call.x);
  require_engine(call.x);
  const at::Tensor given = on_pairs(sums);
  auto [dx, dweight, dbias, dresidual] =
      run_backward(call, Input(call.x), Pass::input_grad, nullptr,
                   reinterpret_cast<const Sums*>(given.const_data_ptr<double>()));
  return {dx, dresidual};
}

InputGradResult input_grad_meta(const BackwardCall& call, const at::Tensor& sums) {
  auto [dx, dweight, dbias, dresidual] = backward_meta(call);
  require_sums(sums, call.x);
  return {dx, dresidual};
}

}  // namespace bnext

// Backward with batch statistics and with fixed ones: which tiles, and the fold between them.
#include <algorithm>
#include <memory>

#include "cpu/launch.h"
#include "cpu/schedule.h"
#include "dispatch.h"
#include "formulas.h"

namespace bnext::cpu {
namespace {

template <class T>
struct BackwardWork {
  using A = opmath_t<T>;

  const BackwardArgs& args;
  Operands operands;
  TileFunction reduce = nullptr;
  TileFunction map = nullptr;
  std::unique_ptr<A[]> coefficients;  // [coefficient][channel]

  BackwardWork(const BackwardArgs& backward_args, const Plan& plan) : args(backward_args) {
    const int64_t channels = args.extent.channels;
    const bool wants_sums = args.dweight != nullptr || args.dbias != nullptr;
    const auto find = instruction_set().find;
    const Traversal traversal = plan.geometry.traversal;
    operands.x = args.x;
    operands.dy = args.dy;
    operands.out = args.dx;
    operands.center = args.mean;
    if (wants_sums || args.batch_statistics) reduce = find(Phase::grad_sums, args.dtype, traversal, false);
    if (args.dx != nullptr) {
      const Phase phase = args.batch_statistics ? Phase::input_grad : Phase::input_grad_frozen;
      map = find(phase, args.dtype, traversal, can_stream(plan, args.dx));
      coefficients.reset(new A[kMaxCoefficients * channels]);
      for (int k = 0; k < kMaxCoefficients; ++k) operands.coefficients[k] = coefficients.get() + k * channels;
    }
  }

  void prepare(int64_t, int64_t) {}
  bool recenter(int64_t, int64_t, const Sums*) { return false; }

  void fold(int64_t channel_begin, int64_t channel_end, const Sums* sums) {
    const auto count = static_cast<double>(args.extent.count());
    for (int64_t c = channel_begin; c < channel_end; ++c) {
      const double mean = args.mean[c], invstd = args.invstd[c];
      const double weight = args.weight ? read_scalar(args.weight.data, args.weight.dtype, c) : 1;
      // The reducers subtracted the mean as their arithmetic can hold it.
      const auto center = static_cast<double>(static_cast<summath_t<T>>(mean));
      if (sums != nullptr) {
        const ParameterGrads grads = parameter_grads(sums[c - channel_begin], mean, center, invstd);
        if (args.dweight != nullptr) static_cast<A*>(args.dweight)[c] = static_cast<A>(grads.dweight);
        if (args.dbias != nullptr) static_cast<A*>(args.dbias)[c] = static_cast<A>(grads.dbias);
      }
      if (args.dx == nullptr) continue;
      const Sums used = args.batch_statistics ? sums[c - channel_begin] : Sums{};
      const auto k = input_grad_coefficients<A>(used, mean, center, invstd, weight, count);
      const A values[kMaxCoefficients] = {k.scale, k.center, k.slope, k.offset};
      for (int i = 0; i < kMaxCoefficients; ++i) coefficients[i * args.extent.channels + c] = values[i];
    }
  }
};

}  // namespace

void backward(const BackwardArgs& args, const Plan& plan) {
  dispatch(args.dtype, [&]<class T>() {
    using A = opmath_t<T>;
    if (args.extent.numel() == 0) {
      for (void* grads : {args.dweight, args.dbias}) {
        if (grads != nullptr) std::fill_n(static_cast<A*>(grads), args.extent.channels, A{0});
      }
      return;
    }
    BackwardWork<T> work(args, plan);
    run(plan, work);
  });
}

}  // namespace bnext::cpu

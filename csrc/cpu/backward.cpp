// Backward with batch statistics and with fixed ones: which tiles and folds, and the memory between them.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>

#include "cpu/launch.h"
#include "cpu/schedule.h"

namespace bnext::cpu {
namespace {

struct BackwardWork {
  const BackwardArgs& args;
  const SlopeClass slope;
  const bool sums_wanted, at_once;  // at once: dx with the sums
  Operands operands;
  TileFunction reduce = nullptr;
  TileFunction map = nullptr;
  std::unique_ptr<double[]> center;
  std::unique_ptr<std::byte[]> coefficients;  // [coefficient][channel]
  BackwardFold vectors;
  Folds folds;

  BackwardWork(const BackwardArgs& backward_args, const Plan& plan)
      : args(backward_args),
        slope(slope_of(args)),
        sums_wanted(args.sums_in == nullptr && (args.dweight != nullptr || args.dbias != nullptr ||
                                                args.sums_out != nullptr || args.batch_statistics)),
        at_once(!args.batch_statistics && args.dx != nullptr && (sums_wanted || needs_input(args))),
        center(args.from_output ? new double[args.extent.channels] : nullptr),
        coefficients(args.dx != nullptr || args.activation ? new std::byte[kMaxCoefficients * stride()]
                                                           : nullptr),
        vectors{args, center.get(), coefficients.get(), from_input()},
        folds(instruction_set().folds(args.dtype)) {
    operands.x = args.x;
    operands.dy = args.dy;
    operands.residual = args.residual;
    operands.mask_read = args.mask;
    operands.out = args.dx;
    operands.dresidual = args.dresidual;
    operands.from_output = args.from_output;
    operands.streaming_stores =
        can_stream(plan, args.dx) && (args.dresidual == nullptr || can_stream(plan, args.dresidual));
    operands.fetches = plan.beyond_cache;
    operands.fetches_first = plan.fetches_first;
    operands.activation = args.activation;
    operands.center = args.from_output ? center.get() : args.mean;
    for (int k = 0; k < kMaxCoefficients && coefficients; ++k)
      operands.coefficients[k] = coefficients.get() + k * stride();
    Kernel kernel{
        .phase = Phase::grad_sums, .dtype = args.dtype, .traversal = plan.geometry.traversal, .slope = slope};
    const auto find = [&](Phase phase) {
      kernel.phase = phase;
      return instruction_set().find(kernel);
    };
    if (at_once) {
      reduce = find(Phase::grad_sums_and_input_grad);
    } else {
      if (sums_wanted) reduce = find(Phase::grad_sums);
      if (args.dx != nullptr) map = find(args.batch_statistics ? Phase::input_grad : Phase::scale);
      operands.dresidual_first = plan.dresidual_first && operands.streaming_stores;
    }
  }

  int64_t stride() const { return args.extent.channels * opmath_bytes(args.dtype); }  // bytes

  // Whether a tile finds dz from z, and not Phase::scale alone.
  bool from_input() const {
    const bool reads_x = args.batch_statistics || at_once || sums_wanted;
    return reads_x && (slope == SlopeClass::relu || slope == SlopeClass::called);
  }

  void prepare(int64_t begin, int64_t end) const { folds.prepare_backward(vectors, begin, end); }
  bool recenter(int64_t, int64_t, const Sums*) const { return false; }
  void fold(int64_t begin, int64_t end, const Sums* sums) const {
    if (args.sums_in != nullptr) {
      prepare(begin, end);
      sums = args.sums_in + begin;
    }
    folds.backward(vectors, begin, end, sums);
  }
};

}  // namespace

void backward(const BackwardArgs& args, const Plan& plan) {
  if (args.extent.numel() == 0) {
    for (void* grads : {args.dweight, args.dbias}) {
      if (grads != nullptr) std::memset(grads, 0, args.extent.channels * opmath_bytes(args.dtype));
    }
    if (args.sums_out != nullptr) std::fill_n(args.sums_out, args.extent.channels, Sums{});
    return;
  }
  BackwardWork work(args, plan);
  run(plan, work);
}

}  // namespace bnext::cpu

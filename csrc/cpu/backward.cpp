// Backward with batch statistics and with fixed ones: which tiles, and the fold between them.
#include <algorithm>
#include <memory>

#include "cpu/channels.h"
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
  const SlopeClass slope;
  const bool sums_wanted, at_once;  // at once: dx with the sums
  Operands operands;
  TileFunction reduce = nullptr;
  TileFunction map = nullptr;
  std::unique_ptr<double[]> center;
  std::unique_ptr<A[]> coefficients;  // [coefficient][channel]

  BackwardWork(const BackwardArgs& backward_args, const Plan& plan)
      : args(backward_args),
        slope(slope_of(args)),
        sums_wanted(args.dweight != nullptr || args.dbias != nullptr || args.batch_statistics),
        at_once(!args.batch_statistics && args.dx != nullptr && (sums_wanted || slope != SlopeClass::none)) {
    const int64_t channels = args.extent.channels;
    operands.x = args.x;
    operands.dy = args.dy;
    operands.residual = args.residual;
    operands.mask_read = args.mask;
    operands.out = args.dx;
    operands.dresidual = args.dresidual;
    operands.streaming_stores =
        can_stream(plan, args.dx) && (args.dresidual == nullptr || can_stream(plan, args.dresidual));
    operands.fetches = plan.beyond_cache;
    operands.activation = args.activation;
    operands.center = args.mean;
    if (args.from_output) {
      center.reset(new double[channels]);
      operands.center = center.get();
      read_channels(args.bias, 0, channels, 0, center.get());
    }
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
    }
    if (args.dx != nullptr || args.activation) {
      coefficients.reset(new A[kMaxCoefficients * channels]);
      for (int k = 0; k < kMaxCoefficients; ++k) operands.coefficients[k] = coefficients.get() + k * channels;
    }
  }

  bool from_input() const {
    return slope == SlopeClass::relu || slope == SlopeClass::other || slope == SlopeClass::residual;
  }

  // What does not need sums: scale of dz; scale and offset of the activation's input, as the forward pass had
  // them.
  void prepare(int64_t channel_begin, int64_t channel_end) {
    if (!coefficients) return;
    A* const out = coefficients.get();
    const int64_t channels = args.extent.channels;
    for_each_fold(channel_begin, channel_end, [&](int64_t c, int64_t n) {
      double weight[kFoldChannels], bias[kFoldChannels];
      read_channels(args.weight, c, n, 1, weight);
      for (int64_t k = 0; k < n; ++k) out[c + k] = static_cast<A>(weight[k] * args.invstd[c + k]);
      if (!from_input()) return;
      read_channels(args.bias, c, n, 0, bias);
      for (int64_t k = 0; k < n; ++k) {
        const auto z = normalize_coefficients<A>(args.mean[c + k], args.invstd[c + k], weight[k], bias[k]);
        out[2 * channels + c + k] = z.scale;
        out[3 * channels + c + k] = z.offset;
      }
    });
  }

  bool recenter(int64_t, int64_t, const Sums*) { return false; }

  void fold(int64_t channel_begin, int64_t channel_end, const Sums* sums) {
    for_each_fold(channel_begin, channel_end, [&](int64_t c, int64_t n) {
      if (sums == nullptr) {
        prepare(c, c + n);
      } else {
        fold_some(c, n, sums + (c - channel_begin));
      }
    });
  }

  // n channels from c on, at most kFoldChannels.
  void fold_some(int64_t c, int64_t n, const Sums* sums) {
    const double inverse_count = 1 / static_cast<double>(args.extent.count());
    double weight[kFoldChannels], mean[kFoldChannels], invstd[kFoldChannels];
    read_channels(args.weight, c, n, 1, weight);
    if (args.from_output) {  // z stands for x
      std::copy_n(center.get() + c, n, mean);
      for (int64_t k = 0; k < n; ++k) invstd[k] = 1 / weight[k];
    } else {
      std::copy_n(args.mean + c, n, mean);
      std::copy_n(args.invstd + c, n, invstd);
    }
    // The reducers subtracted the mean as their arithmetic can hold it.
    const auto held = [](double value) { return static_cast<double>(static_cast<A>(value)); };
    auto* const dweight = static_cast<A*>(args.dweight);
    auto* const dbias = static_cast<A*>(args.dbias);
    for (int64_t k = 0; k < n; ++k) {
      const ParameterGrads grads = parameter_grads(sums[k], mean[k], held(mean[k]), invstd[k]);
      if (dweight != nullptr) dweight[c + k] = static_cast<A>(grads.dweight);
      if (dbias != nullptr) dbias[c + k] = static_cast<A>(grads.dbias);
    }
    if (map == nullptr) return;
    A* const out = coefficients.get() + c;
    const int64_t channels = args.extent.channels, rest = from_input() ? 4 : 2;
    for (int64_t k = 0; k < n; ++k) {
      const auto found = input_grad_coefficients<A>(sums[k], mean[k], held(mean[k]), invstd[k],
                                                    weight[k] * args.invstd[c + k], inverse_count);
      out[k] = found.scale;
      out[channels + k] = found.center;
      out[rest * channels + k] = found.slope;
      out[(rest + 1) * channels + k] = found.offset;
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

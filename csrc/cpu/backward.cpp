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
    operands.activation = args.activation;
    const ActivationClass activation = class_of(args.activation);
    if (wants_sums || args.batch_statistics) {
      reduce = find(Phase::grad_sums, args.dtype, traversal, false, activation);
    }
    if (args.dx != nullptr) {
      const Phase phase = args.batch_statistics ? Phase::input_grad : Phase::input_grad_frozen;
      map = find(phase, args.dtype, traversal, can_stream(plan, args.dx), activation);
    }
    if (args.dx != nullptr || args.activation) {
      coefficients.reset(new A[kMaxCoefficients * channels]);
      for (int k = 0; k < kMaxCoefficients; ++k) operands.coefficients[k] = coefficients.get() + k * channels;
    }
  }

  // Scale and offset of the activation's input, as the forward pass had them.
  void prepare(int64_t channel_begin, int64_t channel_end) {
    if (!args.activation) return;
    A* const out = coefficients.get();
    const int64_t channels = args.extent.channels;
    for_each_fold(channel_begin, channel_end, [&](int64_t c, int64_t n) {
      double weight[kFoldChannels], bias[kFoldChannels];
      read_channels(args.weight, c, n, 1, weight);
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
      fold_some(c, n, sums == nullptr ? nullptr : sums + (c - channel_begin));
    });
  }

  // n channels from c on, at most kFoldChannels.
  void fold_some(int64_t c, int64_t n, const Sums* sums) {
    const double inverse_count = 1 / static_cast<double>(args.extent.count());
    const double* const mean = args.mean + c;
    const double* const invstd = args.invstd + c;
    // The reducers subtracted the mean as their arithmetic can hold it.
    const bool active{args.activation};
    const auto held = [&](double value) {
      return active ? static_cast<double>(static_cast<A>(value))
                    : static_cast<double>(static_cast<summath_t<T>>(value));
    };
    if (sums == nullptr) prepare(c, c + n);  // nothing was reduced
    if (sums != nullptr) {
      auto* const dweight = static_cast<A*>(args.dweight);
      auto* const dbias = static_cast<A*>(args.dbias);
      for (int64_t k = 0; k < n; ++k) {
        const ParameterGrads grads = parameter_grads(sums[k], mean[k], held(mean[k]), invstd[k]);
        if (dweight != nullptr) dweight[c + k] = static_cast<A>(grads.dweight);
        if (dbias != nullptr) dbias[c + k] = static_cast<A>(grads.dbias);
      }
    }
    if (args.dx == nullptr) return;
    double weight[kFoldChannels];
    read_channels(args.weight, c, n, 1, weight);
    A* const out = coefficients.get() + c;
    const int64_t channels = args.extent.channels, rest = active ? 4 : 2;
    for (int64_t k = 0; k < n; ++k) {
      const Sums used = args.batch_statistics ? sums[k] : Sums{};
      const auto found =
          input_grad_coefficients<A>(used, mean[k], held(mean[k]), invstd[k], weight[k], inverse_count);
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

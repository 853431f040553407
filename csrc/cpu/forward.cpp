// Training and inference forward: which tiles, and the fold between them.
#include <cmath>
#include <memory>

#include "cpu/launch.h"
#include "cpu/schedule.h"
#include "dispatch.h"
#include "formulas.h"

namespace bnext::cpu {
namespace {

template <class T>
struct ForwardWork {
  using A = opmath_t<T>;

  const ForwardArgs& args;
  const double factor;  // weight of the batch in the running statistics
  Operands operands;
  TileFunction reduce = nullptr;
  TileFunction map = nullptr;
  std::unique_ptr<double[]> center;
  std::unique_ptr<A[]> coefficients;  // [coefficient][channel]

  ForwardWork(const ForwardArgs& forward_args, double running_factor, const Plan& plan)
      : args(forward_args), factor(running_factor) {
    const int64_t channels = args.extent.channels;
    coefficients.reset(new A[3 * channels]);
    operands.x = args.x;
    operands.out = args.y;
    for (int k = 0; k < 3; ++k) operands.coefficients[k] = coefficients.get() + k * channels;
    const auto find = instruction_set().find;
    if (args.batch_statistics) {
      center.reset(new double[channels]);
      operands.center = center.get();
      reduce = find(Phase::moments, args.dtype, plan.geometry.traversal, false);
    }
    map = find(Phase::normalize, args.dtype, plan.geometry.traversal, can_stream(plan, args.y));
  }

  // A channel's first element, so that a constant channel sums to exactly zero; 0 if it is not finite.
  void prepare(int64_t channel_begin, int64_t channel_end) {
    for (int64_t c = channel_begin; c < channel_end; ++c) {
      const double first = read_scalar(args.x, args.dtype, c * args.extent.inner);
      center[c] = std::isfinite(first) ? first : 0.0;
    }
  }

  // A first element more than four standard deviations from the mean is a bad center: M2 = second - n*delta^2
  // would cancel more than 16 parts in 17. Moves such centers to the mean and says whether the slab must be
  // reduced again.
  bool recenter(int64_t channel_begin, int64_t channel_end, const Sums* sums) {
    bool moved = false;
    for (int64_t c = channel_begin; c < channel_end; ++c) {
      const Sums& s = sums[c - channel_begin];
      const double delta = s.first / static_cast<double>(args.extent.count());
      if (!(s.first * delta > 16 * (s.second - s.first * delta)) || !std::isfinite(s.second)) continue;
      const auto better = static_cast<double>(static_cast<summath_t<T>>(center[c] + delta));
      moved |= better != center[c];
      center[c] = better;
    }
    return moved;
  }

  void fold(int64_t channel_begin, int64_t channel_end, const Sums* sums) {
    const auto count = static_cast<double>(args.extent.count());
    A* const out[3] = {coefficients.get(), coefficients.get() + args.extent.channels,
                       coefficients.get() + 2 * args.extent.channels};
    for (int64_t c = channel_begin; c < channel_end; ++c) {
      const Moments m = sums != nullptr ? moments_from_sums(center[c], sums[c - channel_begin], count)
                                        : Moments{at(args.running_mean, c, 0), at(args.running_var, c, 1)};
      if (sums != nullptr && args.running_mean) {
        update(args.running_mean, c, m.mean);
        update(args.running_var, c, args.unbiased_running_var ? unbiased_var(m.var, count) : m.var);
      }
      args.mean[c] = m.mean;
      args.invstd[c] = inverse_std(m.var, args.eps);
      const auto k =
          normalize_coefficients<A>(m.mean, args.invstd[c], at(args.weight, c, 1), at(args.bias, c, 0));
      out[0][c] = k.center;
      out[1][c] = k.scale;
      out[2][c] = k.offset;
    }
  }

  static double at(const ChannelVector& v, int64_t c, double otherwise) {
    return v ? read_scalar(v.data, v.dtype, c) : otherwise;
  }

  void update(const ChannelVector& running, int64_t c, double batch) const {
    const double old = read_scalar(running.data, running.dtype, c);
    write_scalar(running.data, running.dtype, c, running_update(old, batch, factor));
  }
};

}  // namespace

void forward(const ForwardArgs& args, const Plan& plan) {
  double factor = args.momentum;
  if (args.num_batches_tracked != nullptr) ++*args.num_batches_tracked;
  if (args.cumulative)
    factor = args.num_batches_tracked ? 1.0 / static_cast<double>(*args.num_batches_tracked) : 0.0;
  if (args.extent.numel() == 0) {
    std::fill(args.mean, args.mean + args.extent.channels, 0.0);
    std::fill(args.invstd, args.invstd + args.extent.channels, 0.0);
    return;
  }
  dispatch(args.dtype, [&]<class T>() {
    ForwardWork<T> work(args, factor, plan);
    run(plan, work);
  });
}

}  // namespace bnext::cpu

// Training and inference forward: which tiles, and the fold between them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "cpu/channels.h"
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
    operands.residual = args.residual;
    operands.out = args.y;
    operands.mask = args.mask;
    operands.streaming_stores = can_stream(plan, args.y);
    operands.fetches = plan.beyond_cache;
    operands.activation = args.activation;
    for (int k = 0; k < 3; ++k) operands.coefficients[k] = coefficients.get() + k * channels;
    const auto find = instruction_set().find;
    if (args.batch_statistics) {
      center.reset(new double[channels]);
      operands.center = center.get();
      reduce = find({Phase::moments, args.dtype, plan.geometry.traversal});
    }
    map = find({.phase = Phase::normalize,
                .dtype = args.dtype,
                .traversal = plan.geometry.traversal,
                .activation = class_of(args.activation),
                .residual = args.residual != nullptr});
  }

  void prepare(int64_t channel_begin, int64_t channel_end) {
    const Extent& e = args.extent;
    for_each_fold(channel_begin, channel_end, [&](int64_t c, int64_t n) {
      double samples[kCenterSamples][kFoldChannels];
      const int wanted = e.count() <= kAnyIsCenter ? 1 : kCenterSamples;
      for (int k = 0; k < wanted; ++k) {
        const int64_t from = center_sample(e.outer, e.inner, e.channels * e.inner, k);
        read_channels(args.x, args.dtype, c * e.inner + from, e.inner, n, samples[k]);
      }
      double* const to = center.get() + c;
      if (wanted == 1) {
        for (int64_t i = 0; i < n; ++i) to[i] = finite_or_zero(samples[0][i]);
      } else {
        for (int64_t i = 0; i < n; ++i) to[i] = center_of([&](int k) { return samples[k][i]; });
      }
    });
  }

  // Moves bad centers to the mean and says whether the slab must be reduced again.
  bool recenter(int64_t channel_begin, int64_t channel_end, const Sums* sums) {
    const auto count = static_cast<double>(args.extent.count());
    const int64_t channels = channel_end - channel_begin;
    int any = 0;  // most often none: a loop without branches says so
    for (int64_t k = 0; k < channels; ++k) any |= center_is_bad(sums[k], count);
    if (any == 0) return false;
    bool moved = false;
    for (int64_t k = 0; k < channels; ++k) {
      double& old = center[channel_begin + k];
      if (!center_is_bad(sums[k], count) || !std::isfinite(sums[k].second)) continue;
      const auto better = static_cast<double>(static_cast<A>(old + sums[k].first / count));
      moved |= better != old;
      old = better;
    }
    return moved;
  }

  void fold(int64_t channel_begin, int64_t channel_end, const Sums* sums) {
    for_each_fold(channel_begin, channel_end, [&](int64_t c, int64_t n) {
      if (sums == nullptr) return fold_some(c, n, nullptr);
      const Sums* const some = sums + (c - channel_begin);
      int any = 0;
      for (int64_t k = 0; k < n; ++k) any |= overflowed(some[k]);
      if (any == 0) return fold_some(c, n, some);
      Sums held[kFoldChannels];
      for (int64_t k = 0; k < n; ++k) held[k] = overflowed(some[k]) ? sums_in_double(c + k) : some[k];
      fold_some(c, n, held);
    });
  }

  // Squares, and then perhaps sums, beyond the arithmetic type: float32's end at 1.8e19. True of infinite
  // input too, whose sums in double are as infinite.
  static bool overflowed(const Sums& sums) { return sizeof(A) < sizeof(double) && std::isinf(sums.second); }

  Sums sums_in_double(int64_t c) const {
    const Extent& e = args.extent;
    Sums sums;
    double values[kFoldChannels];
    for (int64_t outer = 0; outer < e.outer; ++outer) {
      for (int64_t i = 0; i < e.inner; i += kFoldChannels) {
        const int64_t n = std::min(kFoldChannels, e.inner - i);
        read_channels(args.x, args.dtype, (outer * e.channels + c) * e.inner + i, 1, n, values);
        for (int64_t k = 0; k < n; ++k) {
          const double d = values[k] - center[c];
          sums += {d, d * d};
        }
      }
    }
    return sums;
  }

  // n channels from c on, at most kFoldChannels. Everything a loop reads or writes is local: it vectorises.
  void fold_some(int64_t c, int64_t n, const Sums* sums) {
    const double count = static_cast<double>(args.extent.count()), eps = args.eps;
    double mean[kFoldChannels], var[kFoldChannels], invstd[kFoldChannels], weight[kFoldChannels],
        bias[kFoldChannels];
    if (sums != nullptr) {
      const double inverse_count = 1 / count;
      const double* const centers = center.get() + c;
      for (int64_t k = 0; k < n; ++k) {
        const Moments m = moments_from_sums(centers[k], sums[k], inverse_count);
        mean[k] = m.mean;
        var[k] = m.var;
      }
      update_running(c, n, mean, var);
    } else {
      read_channels(args.running_mean, c, n, 0, mean);
      read_channels(args.running_var, c, n, 1, var);
    }
    read_channels(args.weight, c, n, 1, weight);
    read_channels(args.bias, c, n, 0, bias);
    A centers[kFoldChannels], scale[kFoldChannels], offset[kFoldChannels];
    for (int64_t k = 0; k < n; ++k) {
      invstd[k] = inverse_std(var[k], eps);
      const auto found = normalize_coefficients<A>(mean[k], invstd[k], weight[k], bias[k]);
      centers[k] = found.center;
      scale[k] = found.scale;
      offset[k] = found.offset;
    }
    std::copy_n(mean, n, args.mean + c);
    std::copy_n(invstd, n, args.invstd + c);
    A* const out = coefficients.get() + c;
    std::copy_n(centers, n, out);
    std::copy_n(scale, n, out + args.extent.channels);
    std::copy_n(offset, n, out + 2 * args.extent.channels);
  }

  void update_running(int64_t c, int64_t n, const double* mean, const double* var) const {
    if (!args.running_mean || factor == 0) return;
    const double bessel =
        args.unbiased_running_var ? unbiased_var(1, static_cast<double>(args.extent.count())) : 1;
    double running[kFoldChannels];
    read_channels(args.running_mean, c, n, 0, running);
    for (int64_t k = 0; k < n; ++k) running[k] = running_update(running[k], mean[k], factor);
    write_channels(args.running_mean, c, n, running);
    read_channels(args.running_var, c, n, 0, running);
    for (int64_t k = 0; k < n; ++k) running[k] = running_update(running[k], var[k] * bessel, factor);
    write_channels(args.running_var, c, n, running);
  }
};

// What tiles do not write as whole words.
void clear_mask(const ForwardArgs& args, const Geometry& geometry) {
  const int64_t run = geometry.traversal == Traversal::planes ? geometry.extent.inner : geometry.row_length();
  const int64_t whole = run % kMaskWord == 0 ? args.extent.numel() / kMaskWord * (kMaskWord / 8) : 0;
  std::memset(static_cast<char*>(args.mask) + whole, 0, mask_bytes(args.extent.numel()) - whole);
}

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
  if (args.mask != nullptr) clear_mask(args, plan.geometry);
  dispatch(args.dtype, [&]<class T>() {
    ForwardWork<T> work(args, factor, plan);
    run(plan, work);
  });
}

}  // namespace bnext::cpu

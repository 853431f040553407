// The folds of a forward pass: centers before the sums are taken; after them statistics, running statistics
// and what the map applies.
//
// Included once per instruction set, after channels.h. A is the arithmetic type. What the loops write is
// local or aliases nothing, so that they become vectors.

void find_centers(const ForwardFold& fold, int64_t begin, int64_t end) {
  const ForwardArgs& args = fold.args;
  const Extent& e = args.extent;
  for_each_fold(begin, end, [&](int64_t c, int64_t n) {
    double samples[kCenterSamples][kFoldChannels];
    const int wanted = e.count() <= kAnyIsCenter ? 1 : kCenterSamples;
    for (int k = 0; k < wanted; ++k) {
      const int64_t from = center_sample(e.outer, e.inner, e.channels * e.inner, k);
      read_channels(args.x, args.dtype, c * e.inner + from, e.inner, n, samples[k]);
    }
    double* const to = fold.center + c;
    if (wanted == 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = finite_or_zero(samples[0][i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = center_of([&](int k) { return samples[k][i]; });
    }
  });
}

// Moves bad centers to the mean and says whether the slab must be reduced again.
template <class A>
bool move_centers(const ForwardFold& fold, int64_t begin, int64_t end, const Sums* sums) {
  if (fold.args.extent.count() <= kAnyIsCenter) return false;
  const auto count = static_cast<double>(fold.args.extent.count());
  int any = 0;  // most often none: a loop without branches says so
  for (int64_t k = 0; k < end - begin; ++k) any |= center_is_bad(sums[k], count);
  if (any == 0) return false;
  bool moved = false;
  for (int64_t k = 0; k < end - begin; ++k) {
    double& old = fold.center[begin + k];
    if (!center_is_bad(sums[k], count) || !__builtin_isfinite(sums[k].second)) continue;
    const auto better = static_cast<double>(static_cast<A>(old + sums[k].first / count));
    moved |= better != old;
    old = better;
  }
  return moved;
}

// Squares, and then perhaps sums, beyond the arithmetic type: float32's end at 1.8e19. True of infinite input
// too, whose sums in double are as infinite.
template <class A>
BNEXT_INLINE bool overflowed(const Sums& sums) {
  return sizeof(A) < sizeof(double) && __builtin_isinf(sums.second);
}

Sums sums_in_double(const ForwardArgs& args, int64_t c, double center) {
  const Extent& e = args.extent;
  Sums sums;
  double values[kFoldChannels];
  for (int64_t outer = 0; outer < e.outer; ++outer) {
    for_each_fold(0, e.inner, [&](int64_t i, int64_t n) {
      read_channels(args.x, args.dtype, (outer * e.channels + c) * e.inner + i, 1, n, values);
      for (int64_t k = 0; k < n; ++k) {
        const double d = values[k] - center;
        sums += {d, d * d};
      }
    });
  }
  return sums;
}

void update_running(const ForwardFold& fold, int64_t c, int64_t n, const double* mean, const double* var) {
  const ForwardArgs& args = fold.args;
  const double factor = fold.factor;
  if (!args.running_mean || factor == 0) return;
  const double bessel =
      args.unbiased_running_var ? unbiased_var(1, static_cast<double>(args.extent.count())) : 1;
  double old_mean[kFoldChannels], old_var[kFoldChannels];
  read_channels(args.running_mean, c, n, 0, old_mean);
  read_channels(args.running_var, c, n, 0, old_var);
  double new_mean[kFoldChannels], new_var[kFoldChannels];
  for (int64_t k = 0; k < n; ++k) new_mean[k] = running_update(old_mean[k], mean[k], factor);
  for (int64_t k = 0; k < n; ++k) new_var[k] = running_update(old_var[k], var[k] * bessel, factor);
  for (int64_t k = 0; k < n && args.skip_nonfinite; ++k) {
    if (fits(new_mean[k], args.running_mean.dtype) && fits(new_var[k], args.running_var.dtype)) continue;
    new_mean[k] = old_mean[k];
    new_var[k] = old_var[k];
  }
  write_channels(args.running_mean, c, n, new_mean);
  write_channels(args.running_var, c, n, new_var);
}

// n channels from c on, at most kFoldChannels. Null sums: with the running statistics.
template <class A>
void fold_moments(const ForwardFold& fold, int64_t c, int64_t n, const Sums* sums) {
  const ForwardArgs& args = fold.args;
  double mean[kFoldChannels], var[kFoldChannels], weight[kFoldChannels], bias[kFoldChannels];
  if (sums != nullptr) {
    const double inverse_count = 1 / static_cast<double>(args.extent.count());
    const double* const centers = fold.center + c;
    for (int64_t k = 0; k < n; ++k) {
      const Moments m = moments_from_sums(centers[k], sums[k], inverse_count);
      mean[k] = m.mean;
      var[k] = m.var;
    }
    if (args.var != nullptr) {
      double* __restrict const var_out = args.var + c;
      for (int64_t k = 0; k < n; ++k) var_out[k] = var[k];
    }
    update_running(fold, c, n, mean, var);
  } else {
    read_channels(args.running_mean, c, n, 0, mean);
    read_channels(args.running_var, c, n, 1, var);
  }
  read_channels(args.weight, c, n, 1, weight);
  read_channels(args.bias, c, n, 0, bias);
  const double eps = args.eps;
  const int64_t channels = args.extent.channels;
  double* __restrict const mean_out = args.mean + c;
  double* __restrict const invstd_out = args.invstd + c;
  A* __restrict const center_out = static_cast<A*>(fold.coefficients) + c;
  A* __restrict const scale_out = center_out + channels;
  A* __restrict const offset_out = scale_out + channels;
  if (args.kept != nullptr) {
    double* __restrict const kept = args.kept + c;
    for (int64_t k = 0; k < n; ++k) kept[k] = weight[k];
    for (int64_t k = 0; k < n; ++k) kept[channels + k] = bias[k];
  }
  for (int64_t k = 0; k < n; ++k) {
    const double invstd = inverse_std(var[k], eps);
    const auto found = normalize_coefficients<A>(mean[k], invstd, weight[k], bias[k]);
    mean_out[k] = mean[k];
    invstd_out[k] = invstd;
    center_out[k] = found.center;
    scale_out[k] = found.scale;
    offset_out[k] = found.offset;
  }
}

template <class A>
void fold_forward(const ForwardFold& fold, int64_t begin, int64_t end, const Sums* sums) {
  for_each_fold(begin, end, [&](int64_t c, int64_t n) {
    if (sums == nullptr) return fold_moments<A>(fold, c, n, nullptr);
    const Sums* const some = sums + (c - begin);
    int any = 0;
    for (int64_t k = 0; k < n; ++k) any |= overflowed<A>(some[k]);
    if (any == 0) return fold_moments<A>(fold, c, n, some);
    Sums held[kFoldChannels];
    for (int64_t k = 0; k < n; ++k)
      held[k] = overflowed<A>(some[k]) ? sums_in_double(fold.args, c + k, fold.center[c + k]) : some[k];
    fold_moments<A>(fold, c, n, held);
  });
}

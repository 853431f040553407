// Forward on a GPU as a reducer and a map, which every engine of kernels takes: moments, normalize, and their
// folds.
#pragma once

#include "cuda/activations.cuh"
#include "cuda/map.cuh"
#include "cuda/mask.cuh"
#include "cuda/reduce.cuh"

namespace bnext::cuda {

struct ForwardParams {
  ForwardArgs args;
  Reduction reduction;
  Mapping mapping;
  MaskOutput mask;
  Reuse output_reuse;
};

inline ForwardParams forward_params(const ForwardArgs& args, const Plan& plan) {
  ForwardParams p{args, {}, {}, {}, plan.streaming_stores ? Reuse::no : Reuse::yes};
  p.args.extent = plan.extent;
  return p;
}

// For a backward pass, once per channel.
BNEXT_DEVICE void keep_parameters(const ForwardArgs& args, int64_t c) {
  if (args.kept == nullptr) return;
  store(args.kept + c, read_channel(args.weight, c, 1));
  store(args.kept + args.extent.channels + c, read_channel(args.bias, c, 0));
}

// Of (x - center): per batch in arithmetic precision of distances from its first element, and of squares
// around its own mean (Chan, Golub, LeVeque, "Updating formulae", 1979), which costs no digits wherever the
// center lies; batches, and how far they lie from the center, in double.
template <class T>
struct MomentsReducer {
  using Storage = T;
  using Math = opmath_t<T>;
  using Center = Math;
  static constexpr int kInputs = 1, kSureInputs = 1, kOutputs = 0, kSureOutputs = 0;
  static constexpr int kVectors = 8, kRowVectors = 8, kKeptVectors = 4, kColumnBatch = 8;
  static constexpr bool kReadsMask = false, kAroundFirst = true;
  static constexpr Reuse kReuse = Reuse::yes;

  const ForwardParams& p;

  BNEXT_DEVICE Input<T> input(int) const { return {static_cast<const T*>(p.args.x), p.args.extent.numel()}; }
  BNEXT_DEVICE Output<T> output(int) const { return {}; }
  BNEXT_DEVICE int phase() const { return phase_of(input(0).data); }

  // Any element will do where sums in double hold n times the digits of Math, see moments_from_sums().
  BNEXT_DEVICE Math center(int64_t c) const {
    const Extent& e = p.args.extent;
    const T* const x = static_cast<const T*>(p.args.x) + c * e.inner;
    if constexpr (sizeof(Math) < sizeof(double)) {
      return static_cast<Math>(finite_or_zero(static_cast<double>(widen(x[0]))));
    } else {
      return center_of(
          [&](int k) { return widen(x[center_sample(e.outer, e.inner, e.channels * e.inner, k)]); });
    }
  }

  struct Centers {
    Vector16 elements{};

    BNEXT_DEVICE void set(int lane, Math center) { set_element<T>(elements, lane, center); }
    BNEXT_DEVICE Math at(int lane) const { return element<T>(elements, lane); }
  };

  template <int kCount>
  BNEXT_DEVICE void add(Sums& sums, const Elements<MomentsReducer, kCount>& elements, Math center) const {
    const auto& x = elements.values[0];
    const Math origin = x[0];
    Math d[kCount];
    BNEXT_UNROLL
    for (int k = 0; k < kCount; ++k) d[k] = x[k] - origin;
    const Math sum = sum_of<kCount>(d), mean = sum * (Math{1} / kCount);
    BNEXT_UNROLL
    for (int k = 0; k < kCount; ++k) d[k] -= mean;
    const double first = sum;
    const double second = multiply_add<double>(first, first * (1.0 / kCount), sum_of_products<kCount>(d, d));
    const double shift = static_cast<double>(origin) - static_cast<double>(center),
                 moved = elements.count * shift;
    sums += {first + moved, multiply_add<double>(shift, multiply_add<double>(2, first, moved), second)};
  }

  BNEXT_DEVICE double factor() const {
    if (!p.args.cumulative) return p.args.momentum;
    return p.args.num_batches_tracked == nullptr
               ? 0.0
               : 1.0 / static_cast<double>(*p.args.num_batches_tracked + 1);  // the map adds the one
  }

  BNEXT_DEVICE void fetch_for_fold(int64_t c) const {
    const ForwardArgs& a = p.args;
    fetch_channel(a.running_mean, c);
    fetch_channel(a.running_var, c);
    fetch_channel(a.weight, c);
    fetch_channel(a.bias, c);
  }

  BNEXT_DEVICE void fold(int64_t c, Math center, const Sums& sums) const {
    const ForwardArgs& a = p.args;
    const auto count = static_cast<double>(anew(a.extent.count()));
    const Moments m = moments_from_sums(static_cast<double>(center), sums, 1 / count);
    store(a.mean + c, m.mean);
    store(a.invstd + c, inverse_std(m.var, a.eps));
    if (a.var != nullptr) store(a.var + c, m.var);
    keep_parameters(a, c);
    const double weight = factor();
    if (!a.running_mean || weight == 0) return;
    const double var = a.unbiased_running_var ? unbiased_var(m.var, count) : m.var;
    const double new_mean = running_update(read_channel(a.running_mean, c, 0), m.mean, weight);
    const double new_var = running_update(read_channel(a.running_var, c, 0), var, weight);
    const bool fit = fits(new_mean, a.running_mean.dtype) && fits(new_var, a.running_var.dtype);
    if (a.skip_nonfinite && !fit) return;
    write_channel(a.running_mean, c, new_mean);
    write_channel(a.running_var, c, new_var);
  }
};

// kJoined: there may be a residual and a mask. kElementary: the activation may be one that is_elementary.
template <class T, bool kJoined, bool kElementary = true>
struct NormalizeMap {
  using Storage = T;
  using Math = opmath_t<T>;
  static constexpr int kInputs = kJoined ? 2 : 1, kSureInputs = 1, kOutputs = 1, kSureOutputs = 1;
  static constexpr int kCoefficients = 3;
  static constexpr bool kReadsMask = false, kWritesMask = kJoined;

  const ForwardParams& p;

  BNEXT_DEVICE Input<T> input(int i) const {
    return {static_cast<const T*>(i == 0 ? p.args.x : p.args.residual), p.args.extent.numel()};
  }
  BNEXT_DEVICE Output<T> output(int) const {
    return {static_cast<T*>(p.args.y), p.args.extent.numel(), p.output_reuse};
  }
  BNEXT_DEVICE const MaskOutput& mask() const { return p.mask; }

  BNEXT_DEVICE void coefficients(int64_t c, bool owner, Math (&values)[kCoefficients]) const {
    const ForwardArgs& a = p.args;
    double mean = 0, invstd = 0;
    if (a.batch_statistics) {
      mean = a.mean[c];
      invstd = a.invstd[c];
    } else {
      mean = read_channel(a.running_mean, c, 0);
      invstd = inverse_std(read_channel(a.running_var, c, 1), a.eps);
      if (owner) {
        store(a.mean + c, mean);
        store(a.invstd + c, invstd);
        keep_parameters(a, c);
      }
    }
    coefficients(c, mean, invstd, values);
  }

  // Of the reducer's sums, as its fold has them.
  BNEXT_DEVICE void coefficients(int64_t c, Math center, const Sums& sums,
                                 Math (&values)[kCoefficients]) const {
    const Moments m = moments_from_sums(static_cast<double>(center), sums,
                                        1 / static_cast<double>(anew(p.args.extent.count())));
    coefficients(c, m.mean, inverse_std(m.var, p.args.eps), values);
  }

  BNEXT_DEVICE void coefficients(int64_t c, double mean, double invstd, Math (&values)[kCoefficients]) const {
    const auto found = normalize_coefficients<Math>(mean, invstd, read_channel(p.args.weight, c, 1),
                                                    read_channel(p.args.bias, c, 0));
    values[0] = found.center;
    values[1] = found.scale;
    values[2] = found.offset;
  }

  template <int kCount, class Coefficient>
  BNEXT_DEVICE uint32_t values(const Elements<NormalizeMap, kCount>& elements, Coefficient c,
                               Math (&out)[kOutputs][kCount]) const {
    const auto& in = elements.values;
    Math(&z)[kCount] = out[0];
    BNEXT_UNROLL
    for (int l = 0; l < kCount; ++l) z[l] = normalize<Math>(in[0][l], c(0, l), c(1, l), c(2, l));
    uint32_t bits = 0;
    if constexpr (kJoined) {
      if (p.args.residual != nullptr) {
        BNEXT_UNROLL
        for (int l = 0; l < kCount; ++l) z[l] += in[1][l];
      }
      if (p.mask.data != nullptr) bits = passing(p.args.activation, z);
    }
    activate_all<kElementary>(p.args.activation, z);
    return bits;
  }
};

BNEXT_DEVICE void count_batch(const ForwardArgs& args) {
  if (args.num_batches_tracked != nullptr && block_index() == 0 && thread_index() == 0) {
    store(args.num_batches_tracked, *args.num_batches_tracked + 1);
  }
}

BNEXT_DEVICE void clear_mask(const MaskOutput& mask) {
  if (mask.data != nullptr && !mask.whole_bytes) mask.clear();
}

}  // namespace bnext::cuda

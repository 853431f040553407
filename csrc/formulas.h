// The mathematics of batch normalization, host and device, each formula once.
//
// Per channel with n elements:   mean = sum(x)/n,  var = sum((x-mean)^2)/n,  invstd = 1/sqrt(var + eps)
// - z = (x - mean) * invstd * weight + bias [+ residual],  y = act(z)
// - dweight = invstd * sum(dz*(x-mean)), dbias = sum(dz)
// - dx with batch statistics: invstd * weight * (dz - sum(dz)/n - (x - mean) * invstd^2 * sum(dz*(x-mean))/n)
// - dx with fixed statistics: invstd * weight * dz
//
// Where y was written over x, z = y's inverse stands for x: (z - bias) / weight is (x - mean) * invstd.
//
// Element loops work with a `center` in opmath that lies within rounding of the mean, so that x - center is
// exact where it matters; what the center lacks (mean - center) goes into the constant term in double. The
// error of y then does not grow with mean/std, and a constant channel gives exactly its bias.
#pragma once

#include <cmath>

#include "storage.h"

namespace bnext {

// Sums over one channel. moments: of (x-c) and (x-c)^2. grad_sums: of dz and dz*(x-c).
struct alignas(16) Sums {
  double first = 0;
  double second = 0;

  BNEXT_HOST_DEVICE void operator+=(const Sums& other) {
    first += other.first;
    second += other.second;
  }
};

BNEXT_HOST_DEVICE double finite_or_zero(double value) { return std::isfinite(value) ? value : 0; }

// The median of three: never a single infinity, perhaps a NaN. By comparisons rather than fmin and fmax, so
// that loops over channels become vectors.
BNEXT_HOST_DEVICE double median_of(double a, double b, double c) {
  const double low = a < b ? a : b, high = a > b ? a : b;
  const double middle = c < high ? c : high;
  return low > middle ? low : middle;
}

constexpr int kCenterSamples = 9;
// None of n elements lies more than sqrt(n - 1) standard deviations from their mean. Of so few that is two at
// most, and any of them will do as the center.
constexpr int64_t kAnyIsCenter = 5;

// Where sample k of a channel lies, in elements from its first: spread over outer and inner indices.
BNEXT_HOST_DEVICE int64_t center_sample(int64_t outer, int64_t inner, int64_t next_outer, int k) {
  return outer * (2 * k + 1) / (2 * kCenterSamples) * next_outer +
         inner * (4 * k % kCenterSamples) / kCenterSamples;
}

// What is subtracted before sums are taken: the median of medians of nine samples, 0 if it is not finite. A
// constant channel sums to exactly zero, and a few outliers, or what is special at borders, do not become the
// center. An element, so that it is exact in every precision.
template <class F>
BNEXT_HOST_DEVICE double center_of(F sample) {
  double median[3];
  for (int k = 0; k < 3; ++k) median[k] = median_of(sample(k), sample(k + 3), sample(k + 6));
  const double middle = median_of(median[0], median[1], median[2]);
  return finite_or_zero(middle);
}

struct Moments {
  double mean;
  double var;  // biased
};

// The center is an element of the channel (or 0), so n*(mean-c)^2 <= n*M2: cancellation in M2 costs at most a
// factor n.
BNEXT_HOST_DEVICE Moments moments_from_sums(double center, const Sums& sums, double inverse_count) {
  const double delta = sums.first * inverse_count;
  const double m2 = sums.second - sums.first * delta;
  return {center + delta, m2 < 0 ? 0 : m2 * inverse_count};
}

// More than two standard deviations from the mean: m2 would cancel more than 4 parts in 5. Where squares are
// too small for their type none is better.
BNEXT_HOST_DEVICE bool center_is_bad(const Sums& sums, double count) {
  const double shift = sums.first * (sums.first / count);
  return sums.second > 0 && shift > 4 * (sums.second - shift);
}

BNEXT_HOST_DEVICE double inverse_std(double var, double eps) { return 1.0 / std::sqrt(var + eps); }

BNEXT_HOST_DEVICE double unbiased_var(double var, double count) { return var * (count / (count - 1)); }

// Not to be asked with factor 0, which keeps the old value whatever the batch holds (0 * NaN would not).
BNEXT_HOST_DEVICE double running_update(double running, double batch, double factor) {
  return (1 - factor) * running + factor * batch;
}

// Whether dtype holds it as a finite number.
BNEXT_HOST_DEVICE bool fits(double value, Dtype dtype) {
  const double largest = dtype == Dtype::float16    ? 65504.0
                         : dtype == Dtype::bfloat16 ? 0x1.fep127
                         : dtype == Dtype::float32  ? 0x1.fffffep127
                                                    : 0x1.fffffffffffffp1023;
  return std::abs(value) <= largest;
}

// What rounding the mean to the center lost; 0 where the difference is not finite.
BNEXT_HOST_DEVICE double lacking(double mean, double center) { return finite_or_zero(mean - center); }

// y = (x - center) * scale + offset
template <class A>
struct NormalizeCoefficients {
  A center, scale, offset;
};

template <class A>
BNEXT_HOST_DEVICE NormalizeCoefficients<A> normalize_coefficients(double mean, double invstd, double weight,
                                                                  double bias) {
  const A center = static_cast<A>(mean);
  const double scale = weight * invstd;
  const double rest = lacking(mean, static_cast<double>(center));
  return {center, static_cast<A>(scale), static_cast<A>(rest == 0 ? bias : bias - scale * rest)};
}

template <class V>
BNEXT_HOST_DEVICE V normalize(const V& x, const V& center, const V& scale, const V& offset) {
  return multiply_add<V>(x - center, scale, offset);
}

struct ParameterGrads {
  double dweight, dbias;
};

// `sums` were taken around `center`; dz*(x-mean) = dz*(x-center) - dz*(mean-center). Infinite ones have no
// rounding to put right, and stay infinite.
BNEXT_HOST_DEVICE double centered_second(const Sums& sums, double mean, double center) {
  return sums.second - finite_or_zero(sums.first) * lacking(mean, center);
}

BNEXT_HOST_DEVICE ParameterGrads parameter_grads(const Sums& sums, double mean, double center,
                                                 double invstd) {
  return {centered_second(sums, mean, center) * invstd, sums.first};
}

// dx = dz * scale + (x - center) * slope + offset;  slope = offset = 0 for fixed statistics
template <class A>
struct InputGradCoefficients {
  A scale, center, slope, offset;
};

// scale: of dz. The sums, mean and invstd may be those of any affine image of x, which then stands for x.
template <class A>
BNEXT_HOST_DEVICE InputGradCoefficients<A> input_grad_coefficients(const Sums& sums, double mean,
                                                                   double sums_center, double invstd,
                                                                   double scale, double inverse_count) {
  const A center = static_cast<A>(mean);
  const double slope = -scale * invstd * invstd * centered_second(sums, mean, sums_center) * inverse_count;
  const double rest = lacking(mean, static_cast<double>(center));
  const double offset = -scale * sums.first * inverse_count - finite_or_zero(slope) * rest;
  return {static_cast<A>(scale), center, static_cast<A>(slope), static_cast<A>(offset)};
}

template <class V>
BNEXT_HOST_DEVICE V input_grad(const V& dz, const V& x, const V& scale, const V& center, const V& slope,
                               const V& offset) {
  return multiply_add<V>(dz, scale, multiply_add<V>(x - center, slope, offset));
}

template <class V>
BNEXT_HOST_DEVICE V fixed_input_grad(const V& dz, const V& scale) {
  return dz * scale;
}

}  // namespace bnext

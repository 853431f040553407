// dz, the gradient at the activation's input, and what backward knows of a channel: the same for its sums and
// for its map.
#pragma once

#include <limits>

#include "cuda/activations.cuh"
#include "cuda/batch.cuh"
#include "formulas.h"

namespace bnext::cuda {

// What dz is found from, besides dy: nothing, without an activation; the forward pass's mask; the
// activation's input or output; either of the latter two, asked as the kernel runs.
enum class Slope : uint8_t { one, mask, found, any };

constexpr bool is_found(Slope slope) { return slope == Slope::found || slope == Slope::any; }

inline Slope slope_of(const BackwardArgs& args) {
  return !args.activation ? Slope::one : args.mask != nullptr ? Slope::mask : Slope::found;
}

// Of what stands for x: x itself, or the z that gave the output.
struct Standing {
  double mean, invstd;
};

// With a weight of 0 the output says nothing of x: its invstd is `lost`.
BNEXT_DEVICE Standing standing(const BackwardArgs& args, int64_t c, double lost) {
  if (!args.from_output) return {args.mean[c], args.invstd[c]};
  const double weight = read_channel(args.weight, c, 1);
  return {read_channel(args.bias, c, 0), weight == 0 ? lost : 1 / weight};
}

// Around the mean as far as arithmetic precision holds it; what that lacks comes in after the sums.
template <class A>
BNEXT_DEVICE double held(double mean) {
  return static_cast<double>(static_cast<A>(mean));
}

// Of a channel; what a kernel does not need is not set.
template <class A>
struct GradientTerms {
  A center, z_scale, z_offset, dx_scale;
};

template <class T, Slope kSlope>
struct Gradient {
  using Math = opmath_t<T>;

  const BackwardArgs& args;

  // Of the activation's input, as the forward pass had them.
  BNEXT_DEVICE void input_terms(int64_t c, GradientTerms<Math>& terms) const {
    const auto found = normalize_coefficients<Math>(
        args.mean[c], args.invstd[c], read_channel(args.weight, c, 1), read_channel(args.bias, c, 0));
    terms.z_scale = found.scale;
    terms.z_offset = found.offset;
  }

  BNEXT_DEVICE double scale(int64_t c) const { return read_channel(args.weight, c, 1) * args.invstd[c]; }

  // sums: of dz, for batch statistics.
  BNEXT_DEVICE InputGradCoefficients<Math> coefficients(int64_t c, const Sums& sums) const {
    const Standing of = standing(args, c, 0);
    return input_grad_coefficients<Math>(sums, of.mean, held<Math>(of.mean), of.invstd, scale(c),
                                         1 / static_cast<double>(args.extent.count()));
  }

  BNEXT_DEVICE ParameterGrads grads(int64_t c, const Sums& sums) const {
    const Standing of = standing(args, c, std::numeric_limits<double>::quiet_NaN());
    return parameter_grads(sums, of.mean, held<Math>(of.mean), of.invstd);
  }

  // dy becomes dz, and x what stands for it; residual may be absent. terms(k): of element k.
  template <int kCount, class Terms>
  BNEXT_DEVICE void find(Math (&dy)[kCount], Math (&x)[kCount], const Math (&residual)[kCount],
                         Terms terms) const {
    if (args.from_output) return invert_all<T>(args.activation, dy, x);
    Math z[kCount];
    BNEXT_UNROLL
    for (int k = 0; k < kCount; ++k) {
      const GradientTerms<Math> t = terms(k);
      z[k] = normalize<Math>(x[k], t.center, t.z_scale, t.z_offset);
    }
    if (args.residual != nullptr) {
      BNEXT_UNROLL
      for (int k = 0; k < kCount; ++k) z[k] += residual[k];
    }
    activation_grad_all(args.activation, dy, z);
  }

  // Of elements whose values are dy, x and residual, as many as there are.
  template <class Operation, int kCount, class Terms>
  BNEXT_DEVICE void find(Elements<Operation, kCount>& elements, Terms terms) const {
    auto& values = elements.values;
    if (kSlope == Slope::mask || (kSlope == Slope::any && args.mask != nullptr)) {
      masked_grad_all(args.activation, values[0], elements.passes);
    } else if constexpr (is_found(kSlope)) {
      find(values[0], values[1], values[2], terms);
    }
  }
};

}  // namespace bnext::cuda

// Activations of a fused layer, host and device: names, values and gradients, each formula once.
//
// The formulas are templates over V, which is float, double or a GCC vector of either, and A, its element.
// `kind` is meant to be uniform over a loop. Elementary gives static exp, expm1, log1p, erf and tanh of a V,
// and not_below, which leaves NaN, and -0 at a bound of 0, as they are.
//
// NaN, infinities and kinks are those of torch's own functions on one element (its vector and scalar code
// disagree in the gradient at NaN of relu6, elu and hardswish: it is dy here). An activation that selects
// must not multiply instead: 0 * infinity is not the 0 that torch gives.
#pragma once

#include <cmath>

#include "storage.h"

namespace bnext {

enum class Activation : uint8_t { none, relu, leaky_relu, relu6, silu, gelu, elu, hardswish, sigmoid, tanh };

struct ActivationEntry {
  const char* name;
  bool takes_parameter;
  double parameter;  // torch's default; 0 where none is taken
};

// In the order of Activation. leaky_relu's parameter is its slope below 0, elu's is minus its limit at
// -infinity; gelu is the one by erf, torch's approximate='none'.
constexpr ActivationEntry kActivations[] = {
    {"none", false, 0},    {"relu", false, 0}, {"leaky_relu", true, 0.01}, {"relu6", false, 0},
    {"silu", false, 0},    {"gelu", false, 0}, {"elu", true, 1},           {"hardswish", false, 0},
    {"sigmoid", false, 0}, {"tanh", false, 0},
};
constexpr int kActivationCount = sizeof kActivations / sizeof kActivations[0];
static_assert(kActivationCount == static_cast<int>(Activation::tanh) + 1);

constexpr const ActivationEntry& activation_entry(Activation kind) {
  return kActivations[static_cast<int>(kind)];
}
constexpr const char* activation_name(Activation kind) { return activation_entry(kind).name; }

struct ScalarElementary {
  template <class A>
  BNEXT_HOST_DEVICE static A exp(A z) {
    return std::exp(z);
  }
  template <class A>
  BNEXT_HOST_DEVICE static A expm1(A z) {
    return std::expm1(z);
  }
  template <class A>
  BNEXT_HOST_DEVICE static A log1p(A z) {
    return std::log1p(z);
  }
  template <class A>
  BNEXT_HOST_DEVICE static A erf(A z) {
    return std::erf(z);
  }
  template <class A>
  BNEXT_HOST_DEVICE static A tanh(A z) {
    return std::tanh(z);
  }
  template <class A>
  BNEXT_HOST_DEVICE static A not_below(A z, A low) {
    return z < low ? low : z;
  }
};

// Computed from an elementary function: exp, log1p, erf or tanh.
constexpr bool is_elementary(Activation kind) {
  return kind == Activation::silu || kind == Activation::gelu || kind == Activation::elu ||
         kind == Activation::sigmoid || kind == Activation::tanh;
}

// Whose gradient is dy where activation_passes says so, blocked_grad of it elsewhere: one bit tells.
constexpr bool is_masked(Activation kind) {
  return kind == Activation::relu || kind == Activation::leaky_relu || kind == Activation::relu6;
}

// Whether backward can recover z from y = act(z), one to one with this parameter.
constexpr bool is_invertible(Activation kind, double param) {
  return kind == Activation::none ||
         ((kind == Activation::leaky_relu || kind == Activation::elu) && param > 0);
}

// Whether the gradient passes unchanged at z, of a kind that is_masked. NaN passes, except with leaky_relu.
template <class A, class V>
BNEXT_HOST_DEVICE auto activation_passes(Activation kind, const V& z) {
  const auto positive = z > V{};
  if (kind == Activation::leaky_relu) return positive;
  const auto not_low = !(z <= V{});
  if (kind == Activation::relu) return decltype(positive)(not_low);
  return decltype(positive)(not_low & !(z >= V{} + A(6)));
}

template <class V, class A>
BNEXT_HOST_DEVICE V blocked_grad(Activation kind, A param, const V& dy) {
  return kind == Activation::leaky_relu ? V(dy * param) : V{};
}

// Kept inside [0, 6]; NaN and -0 pass.
template <class Elementary, class A, class V>
BNEXT_HOST_DEVICE V clamp_to_six(const V& z) {
  const V above = Elementary::not_below(z, V{});
  return above > V{} + A(6) ? V{} + A(6) : above;
}

template <class Elementary, class A, class V>
BNEXT_HOST_DEVICE V logistic(const V& z) {
  return A(1) / (A(1) + Elementary::exp(-z));
}

// The standard normal distribution up to z.
template <class Elementary, class A, class V>
BNEXT_HOST_DEVICE V normal_cdf(const V& z) {
  return A(0.5) * (A(1) + Elementary::erf(z * A(0.70710678118654752440)));  // sqrt(1/2)
}

template <class Elementary, class V, class A>
BNEXT_HOST_DEVICE V activate(Activation kind, A param, const V& z) {
  switch (kind) {
    case Activation::relu:
      return Elementary::not_below(z, V{});
    case Activation::leaky_relu:
      return z > V{} ? z : z * param;
    case Activation::relu6:
      return clamp_to_six<Elementary, A>(z);
    case Activation::silu:
      return z / (A(1) + Elementary::exp(-z));
    case Activation::gelu:
      return z * normal_cdf<Elementary, A>(z);
    case Activation::elu:
      return z > V{} ? z : Elementary::expm1(z) * param;
    case Activation::hardswish:
      return z * clamp_to_six<Elementary, A>(V(z + A(3))) / A(6);
    case Activation::sigmoid:
      return logistic<Elementary, A>(z);
    case Activation::tanh:
      return Elementary::tanh(z);
    default:
      return z;
  }
}

// dz, from dy and the z that activate was given.
template <class Elementary, class V, class A>
BNEXT_HOST_DEVICE V activation_grad(Activation kind, A param, const V& dy, const V& z) {
  switch (kind) {
    case Activation::relu:
    case Activation::leaky_relu:
    case Activation::relu6:
      return activation_passes<A>(kind, z) ? dy : blocked_grad(kind, param, dy);
    case Activation::silu: {
      const V s = logistic<Elementary, A>(z);
      return dy * (s * multiply_add<V>(z, A(1) - s, V{} + A(1)));
    }
    case Activation::gelu: {
      const V density = Elementary::exp(z * z * A(-0.5)) * A(0.39894228040143267794);  // 1/sqrt(2 pi)
      return dy * multiply_add<V>(z, density, normal_cdf<Elementary, A>(z));
    }
    case Activation::elu:
      return z <= V{} ? dy * param * Elementary::exp(z) : dy;
    case Activation::hardswish: {
      const V below_three = z < V{} + A(3) ? dy * (z / A(3) + A(0.5)) : dy;
      return z <= V{} - A(3) ? V{} : below_three;
    }
    case Activation::sigmoid: {
      const V s = logistic<Elementary, A>(z);
      return dy * (s * (A(1) - s));
    }
    case Activation::tanh: {
      const V t = Elementary::tanh(z);
      return dy * multiply_add<V>(-t, t, V{} + A(1));
    }
    default:
      return dy;
  }
}

// z from y = act(z), of one that is_invertible. elu's limit says no more than that z is low: as low as
// storage T, which y was rounded to, tells apart.
template <class T, class Elementary, class V, class A>
BNEXT_HOST_DEVICE V activation_inverse(Activation kind, A param, const V& y) {
  if (kind == Activation::leaky_relu) return y > V{} ? y : V(y / param);
  if (kind != Activation::elu) return y;
  const V lowest = V{} - A((kSignificandBits<T> + 1) * 0.69314718055994530942);  // ln(2)
  const V z = Elementary::log1p(V(y / param));
  const V below = z < lowest ? lowest : z;
  return y > V{} ? y : below;
}

// activation_grad from what activate gave.
template <class V, class A>
BNEXT_HOST_DEVICE V activation_grad_from_output(Activation kind, A param, const V& dy, const V& y) {
  const V low = kind == Activation::elu ? V(dy * (y + param)) : V(dy * param);
  return kind == Activation::none ? dy : y <= V{} ? low : dy;
}

}  // namespace bnext

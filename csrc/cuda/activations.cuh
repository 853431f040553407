// Activations of a vector: the kind is found once, not per element.
#pragma once

#include "activation.h"
#include "args.h"
#include "cuda/primitives.cuh"

namespace bnext::cuda {

// f.operator()<kind>() for every kind but none.
template <class F>
BNEXT_DEVICE void with_activation(Activation kind, F f) {
  switch (kind) {
    case Activation::none:
      return;
    case Activation::relu:
      return f.template operator()<Activation::relu>();
    case Activation::leaky_relu:
      return f.template operator()<Activation::leaky_relu>();
    case Activation::relu6:
      return f.template operator()<Activation::relu6>();
    case Activation::silu:
      return f.template operator()<Activation::silu>();
    case Activation::gelu:
      return f.template operator()<Activation::gelu>();
    case Activation::elu:
      return f.template operator()<Activation::elu>();
    case Activation::hardswish:
      return f.template operator()<Activation::hardswish>();
    case Activation::sigmoid:
      return f.template operator()<Activation::sigmoid>();
    case Activation::tanh:
      return f.template operator()<Activation::tanh>();
  }
}

// kElementary: it may be one that is_elementary. Those are most of a kernel's code, unrolled per vector; one
// that runs none of them need not fetch its instructions from between theirs.
template <bool kElementary, int kCount, class A>
BNEXT_DEVICE void activate_all(const ActivationSpec& activation, A (&z)[kCount]) {
  const A param = static_cast<A>(activation.param);
  with_activation(activation.kind, [&]<Activation kKind>() {
    if constexpr (kElementary || !is_elementary(kKind)) {
      BNEXT_UNROLL
      for (int k = 0; k < kCount; ++k) z[k] = activate<ScalarElementary>(kKind, param, z[k]);
    }
  });
}

// A bit per element: whether its gradient passes. Of one that is_masked.
template <int kCount, class A>
BNEXT_DEVICE uint32_t passing(const ActivationSpec& activation, const A (&z)[kCount]) {
  uint32_t bits = 0;
  with_activation(activation.kind, [&]<Activation kKind>() {
    if constexpr (is_masked(kKind)) {
      BNEXT_UNROLL
      for (int k = 0; k < kCount; ++k) bits |= uint32_t{activation_passes<A>(kKind, z[k])} << k;
    }
  });
  return bits;
}

// dy to dz, by what passing() said.
template <int kCount, class A>
BNEXT_DEVICE void masked_grad_all(const ActivationSpec& activation, A (&dy)[kCount],
                                  const bool (&passes)[kCount]) {
  const A param = static_cast<A>(activation.param);
  BNEXT_UNROLL
  for (int k = 0; k < kCount; ++k) {
    dy[k] = passes[k] ? dy[k] : blocked_grad(activation.kind, param, dy[k]);
  }
}

// dy to dz, and y to the z that gave it. Of one that is_invertible.
template <class T, int kCount, class A>
BNEXT_DEVICE void invert_all(const ActivationSpec& activation, A (&dy)[kCount], A (&y)[kCount]) {
  const A param = static_cast<A>(activation.param);
  with_activation(activation.kind, [&]<Activation kKind>() {
    if constexpr (is_invertible(kKind, 1)) {
      BNEXT_UNROLL
      for (int k = 0; k < kCount; ++k) {
        dy[k] = activation_grad_from_output(kKind, param, dy[k], y[k]);
        y[k] = activation_inverse<T, ScalarElementary>(kKind, param, y[k]);
      }
    }
  });
}

// dy to dz.
template <int kCount, class A>
BNEXT_DEVICE void activation_grad_all(const ActivationSpec& activation, A (&dy)[kCount],
                                      const A (&z)[kCount]) {
  const A param = static_cast<A>(activation.param);
  with_activation(activation.kind, [&]<Activation kKind>() {
    BNEXT_UNROLL
    for (int k = 0; k < kCount; ++k) dy[k] = activation_grad<ScalarElementary>(kKind, param, dy[k], z[k]);
  });
}

}  // namespace bnext::cuda

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

template <int kCount, class A>
BNEXT_DEVICE void activate_all(const ActivationSpec& activation, A (&z)[kCount]) {
  const A param = static_cast<A>(activation.param);
  with_activation(activation.kind, [&]<Activation kKind>() {
    BNEXT_UNROLL
    for (int k = 0; k < kCount; ++k) z[k] = activate<ScalarElementary>(kKind, param, z[k]);
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

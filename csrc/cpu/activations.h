// Activations of sixteen lanes: as a policy of maps and reducers. Included once per instruction set.

// Whole parts at a time, by the formulas of activation.h.
template <class A>
BNEXT_INLINE Lanes<A> activate_lanes(Activation kind, A param, const Lanes<A>& z) {
  return generate<A>([&](auto i) __attribute__((always_inline)) {
    return activate<VectorElementary>(kind, param, z.part[i.value]);
  });
}
template <class A>
BNEXT_INLINE Lanes<A> activation_grad_lanes(Activation kind, A param, const Lanes<A>& dy, const Lanes<A>& z) {
  return generate<A>([&](auto i) __attribute__((always_inline)) {
    return activation_grad<VectorElementary>(kind, param, dy.part[i.value], z.part[i.value]);
  });
}

// Too much code for every loop: calls, once per sixteen elements.
template <class A>
__attribute__((noinline)) void call_activate(Activation kind, A param, Lanes<A>& z) {
  z = activate_lanes(kind, param, z);
}
template <class A>
__attribute__((noinline)) void call_activation_grad(Activation kind, A param, Lanes<A>& dy,
                                                    const Lanes<A>& z) {
  dy = activation_grad_lanes(kind, param, dy, z);
}

template <class A>
struct Linear {
  static constexpr bool kActive = false;

  explicit Linear(const Operands&) {}
  BNEXT_INLINE Lanes<A> value(const Lanes<A>& z) const { return z; }
};

template <class A>
struct Relu {
  static constexpr bool kActive = true;

  explicit Relu(const Operands&) {}
  BNEXT_INLINE Lanes<A> value(const Lanes<A>& z) const { return activate_lanes(Activation::relu, A{}, z); }
  BNEXT_INLINE Lanes<A> grad(const Lanes<A>& dy, const Lanes<A>& z) const {
    return activation_grad_lanes(Activation::relu, A{}, dy, z);
  }
};

template <class A>
struct Called {
  static constexpr bool kActive = true;
  Activation kind;
  A param;

  explicit Called(const Operands& operands)
      : kind(operands.activation.kind), param(static_cast<A>(operands.activation.param)) {}
  BNEXT_INLINE Lanes<A> value(Lanes<A> z) const {
    call_activate(kind, param, z);
    return z;
  }
  BNEXT_INLINE Lanes<A> grad(Lanes<A> dy, const Lanes<A>& z) const {
    call_activation_grad(kind, param, dy, z);
    return dy;
  }
};

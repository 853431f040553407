// Activations of sixteen lanes, as policies: of the forward map, and of what takes dy to dz in backward.
//
// Included once per instruction set, after bits.h.

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

template <class T, class A>
__attribute__((noinline)) void call_from_output(Activation kind, A param, Lanes<A>& dy, Lanes<A>& y) {
  dy = generate<A>([&](auto i) __attribute__((always_inline)) {
    return activation_grad_from_output(kind, param, dy.part[i.value], y.part[i.value]);
  });
  y = generate<A>([&](auto i) __attribute__((always_inline)) {
    return activation_inverse<T, VectorElementary>(kind, param, y.part[i.value]);
  });
}

// ---- forward: value(z) and, with kActive, passes(z), the mask's bits; kAny: whatever is asked for, by tests
// in the loop ----

template <class T>
struct Linear {
  using A = opmath_t<T>;
  static constexpr bool kActive = false, kAny = false;

  explicit Linear(const Operands&) {}
  BNEXT_INLINE Lanes<A> value(const Lanes<A>& z) const { return z; }
};

template <class T>
struct Relu {
  using A = opmath_t<T>;
  static constexpr bool kActive = true, kAny = false;

  explicit Relu(const Operands&) {}
  BNEXT_INLINE Lanes<A> value(const Lanes<A>& z) const { return activate_lanes(Activation::relu, A{}, z); }
  BNEXT_INLINE uint32_t passes(const Lanes<A>& z) const {
    return bits_where<T>(
        z, [](auto v) __attribute__((always_inline)) { return activation_passes<A>(Activation::relu, v); });
  }
};

template <class T>
struct Called {
  using A = opmath_t<T>;
  static constexpr bool kActive = true, kAny = true;
  Activation kind;
  A param;

  explicit Called(const Operands& operands)
      : kind(operands.activation.kind), param(static_cast<A>(operands.activation.param)) {}
  BNEXT_INLINE Lanes<A> value(Lanes<A> z) const {
    call_activate(kind, param, z);
    return z;
  }
  BNEXT_INLINE uint32_t passes(const Lanes<A>& z) const {
    return bits_where<T>(
        z, [&](auto v) __attribute__((always_inline)) { return activation_passes<A>(kind, v); });
  }
};

// ---- backward: dy to dz ----
// With kFromInput apply(span, offset, dy, value, z): value is x, or stands for it, z = normalize(value).
// Else, with kActive, apply(span, offset, dy). kResidual: dz may be stored as dresidual. reads(): tensors
// that are read besides dy and x.

struct ReadsNoMore {
  static constexpr int reads() { return 0; }
  template <Cache C>
  BNEXT_INLINE void fetch_at(int64_t) const {}
};

template <class T>
struct LinearSlope : ReadsNoMore {
  static constexpr bool kActive = false, kFromInput = false, kResidual = false;
  explicit LinearSlope(const Operands&) {}
};

template <class T>
struct ReluSlope : ReadsNoMore {
  using A = opmath_t<T>;
  static constexpr bool kActive = true, kFromInput = true, kResidual = false;

  explicit ReluSlope(const Operands&) {}
  template <class Span>
  BNEXT_INLINE void apply(Span, int64_t, Lanes<A>& dy, const Lanes<A>&, const Lanes<A>& z) const {
    dy = activation_grad_lanes(Activation::relu, A{}, dy, z);
  }
};

// By the mask of one whose blocked gradient is 0.
template <class T>
struct MaskSlope : ReadsNoMore {
  using A = opmath_t<T>;
  static constexpr bool kActive = true, kFromInput = false, kResidual = true;
  const void* mask;

  explicit MaskSlope(const Operands& operands) : mask(operands.mask_read) {}
  template <class Span>
  BNEXT_INLINE void apply(Span span, int64_t offset, Lanes<A>& dy) const {
    dy = select<T>(read_bits(mask, span.begin(offset)), dy, Lanes<A>{});
  }
};

// By the mask of any that has one.
template <class T>
struct AnyMaskSlope : ReadsNoMore {
  using A = opmath_t<T>;
  static constexpr bool kActive = true, kFromInput = false, kResidual = true;
  Activation kind;
  A param;
  const void* mask;

  explicit AnyMaskSlope(const Operands& operands)
      : kind(operands.activation.kind),
        param(static_cast<A>(operands.activation.param)),
        mask(operands.mask_read) {}
  template <class Span>
  BNEXT_INLINE void apply(Span span, int64_t offset, Lanes<A>& dy) const {
    const Lanes<A> blocked = generate<A>(
        [&](auto i) __attribute__((always_inline)) { return blocked_grad(kind, param, dy.part[i.value]); });
    dy = select<T>(read_bits(mask, span.begin(offset)), dy, blocked);
  }
};

// By what is at hand, for any activation: a mask, the output in the place of x, or x and perhaps a residual.
template <class T>
struct CalledSlope {
  using A = opmath_t<T>;
  static constexpr bool kActive = true, kFromInput = true, kResidual = true;
  Activation kind;
  A param;
  bool from_output;
  AnyMaskSlope<T> by_mask;
  const T* residual;

  explicit CalledSlope(const Operands& operands)
      : kind(operands.activation.kind),
        param(static_cast<A>(operands.activation.param)),
        from_output(operands.from_output),
        by_mask(operands),
        residual(static_cast<const T*>(operands.residual)) {}
  int reads() const { return residual != nullptr; }
  template <Cache C>
  BNEXT_INLINE void fetch_at(int64_t offset) const {
    if (residual != nullptr) fetch<C>(residual + offset);
  }
  template <class Span>
  BNEXT_INLINE void apply(Span span, int64_t offset, Lanes<A>& dy, Lanes<A>& value, Lanes<A> z) const {
    if (by_mask.mask != nullptr) {
      by_mask.apply(span, offset, dy);
    } else if (from_output) {
      call_from_output<T>(kind, param, dy, value);
    } else {
      if (residual != nullptr) z = z + span.template load_lanes<A>(residual + offset);
      call_activation_grad(kind, param, dy, z);
    }
  }
};

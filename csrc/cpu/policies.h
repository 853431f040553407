// What happens to sixteen elements: reducers and maps, templates over the storage type.
//
// Included once per instruction set (see vector.h), after spans.h. A step takes the offset and a Span.

template <class A>
struct LaneSums {
  Lanes<A> first, second;

  BNEXT_INLINE void operator+=(const LaneSums& other) {
    first = first + other.first;
    second = second + other.second;
  }
};

template <class A>
BNEXT_INLINE Lanes<double> as_double(const Lanes<A>& v) {
  if constexpr (sizeof(A) == sizeof(double)) {
    return v;
  } else {
    alignas(64) A buffer[kLanes];
    store(buffer, v);
    return load<double>(buffer);
  }
}

// The sums of lanes of T to sums of elements.
template <class T, class A>
BNEXT_INLINE void add_to(double* first, double* second, const LaneSums<A>& sums) {
  store(first, load<double>(first) + as_double(in_memory_order<T>(sums.first)));
  store(second, load<double>(second) + as_double(in_memory_order<T>(sums.second)));
}

// ---- reducers ----
// coefficient(operands, k, channel): 0 is the center, what is subtracted from x. fetch_at: the reads()
// tensors.

template <class T>
struct MomentsReducer {
  using Storage = T;
  using Math = opmath_t<T>;
  static constexpr int kCoefficients = 1;
  const T* x;

  explicit MomentsReducer(const Operands& operands) : x(static_cast<const T*>(operands.x)) {}
  static constexpr int reads() { return 1; }

  BNEXT_INLINE static Math coefficient(const Operands& operands, int, int64_t channel) {
    return static_cast<Math>(operands.center[channel]);
  }
  template <Cache C = Cache::l2>
  BNEXT_INLINE void fetch_at(int64_t offset) const {
    fetch<C>(x + offset);
  }

  template <class Span>
  BNEXT_INLINE void step(LaneSums<Math>& sums, int64_t offset, const Coefficients<Math, 1>& c,
                         Span span) const {
    const Lanes<Math> d = span.template keep<T>(span.template load_lanes<Math>(x + offset) - c.k[0]);
    sums.first = sums.first + d;
    sums.second = sums.second + d * d;
  }
};

// x, dy and dz, for all that backward does. What needs z computes it again, in the precision of the forward
// pass: what the slope is must be what it was there.
template <class T, class Slope>
struct Gradient {
  using Math = opmath_t<T>;
  const T* x;
  const T* dy;
  T* dx;
  T* dresidual;
  Slope slope;

  Gradient(const Operands& operands, bool writes_residual)
      : x(static_cast<const T*>(operands.x)),
        dy(static_cast<const T*>(operands.dy)),
        dx(static_cast<T*>(operands.out)),
        dresidual(writes_residual ? static_cast<T*>(operands.dresidual) : nullptr),
        slope(operands) {}

  template <Cache C = Cache::l2>
  BNEXT_INLINE void fetch_at(int64_t offset) const {
    fetch<C>(x + offset);
    fetch<C>(dy + offset);
    slope.template fetch_at<C>(offset);
  }

  // c: center, then with kFromInput scale and offset of z.
  template <class Span>
  BNEXT_INLINE void load(Lanes<Math>& dz, Lanes<Math>& value, int64_t offset, const Lanes<Math>* c,
                         Span span) const {
    dz = span.template load_lanes<Math>(dy + offset);
    value = span.template load_lanes<Math>(x + offset);
    if constexpr (Slope::kFromInput) {
      slope.apply(span, offset, dz, value, normalize(value, c[0], c[1], c[2]));
    } else if constexpr (Slope::kActive) {
      slope.apply(span, offset, dz);
    }
  }

  template <class Span>
  BNEXT_INLINE void store(int64_t offset, const Lanes<Math>& gradient, const Lanes<Math>& dz,
                          Span span) const {
    span.store_lanes(dx + offset, gradient);
    store_residual(offset, dz, span);
  }
  template <class Span>
  BNEXT_INLINE void store_residual(int64_t offset, const Lanes<Math>& dz, Span span) const {
    if constexpr (Slope::kResidual) {
      if (dresidual != nullptr) span.store_lanes(dresidual + offset, dz);
    }
  }
};

// With Writes and fixed statistics dx needs no sums: it is written as they are taken, its scale after the
// other coefficients.
template <class T, class Slope, bool Writes>
struct GradSumsReducer {
  using Storage = T;
  using Math = opmath_t<T>;
  static constexpr int kScale = Slope::kFromInput ? 3 : 1, kCoefficients = kScale + Writes;
  Gradient<T, Slope> gradient;

  explicit GradSumsReducer(const Operands& operands)
      : gradient(operands, Writes || operands.dresidual_first) {}
  int reads() const { return 2 + gradient.slope.reads(); }

  BNEXT_INLINE static Math coefficient(const Operands& operands, int k, int64_t channel) {
    if (k == 0) return static_cast<Math>(operands.center[channel]);
    const void* const values = operands.coefficients[k == kScale ? 0 : k + 1];
    return static_cast<const Math*>(values)[channel];
  }
  template <Cache C = Cache::l2>
  BNEXT_INLINE void fetch_at(int64_t offset) const {
    gradient.template fetch_at<C>(offset);
  }

  template <class Span>
  BNEXT_INLINE void step(LaneSums<Math>& sums, int64_t offset, const Coefficients<Math, kCoefficients>& c,
                         Span span) const {
    Lanes<Math> dz, value;
    gradient.load(dz, value, offset, c.k, span);
    if constexpr (Writes) {
      gradient.store(offset, fixed_input_grad(dz, c.k[kScale]), dz, span);
    } else {
      gradient.store_residual(offset, dz, span);
    }
    dz = span.template keep<T>(dz);
    const Lanes<Math> d = span.template keep<T>(value - c.k[0]);
    sums.first = sums.first + dz;
    sums.second = sums.second + dz * d;
  }
};

// ---- maps ----
// Bits writes what a map has of a mask; seek(offset) comes before the steps of a run. fetch_at(reduced,
// mapped): what a reducer reads, at one offset; what the map alone reads, at the other.

template <class T, class Act, Beside kBeside>
struct NormalizeMap {
  using Storage = T;
  using Math = opmath_t<T>;
  static constexpr bool kMasked = Act::kActive && kBeside != Beside::nothing;
  using Bits = std::conditional_t<kMasked, BitWriter, NoBits>;
  static constexpr int kCoefficients = 3;
  const T* x;
  const T* residual;
  T* y;
  Act act;

  explicit NormalizeMap(const Operands& operands)
      : x(static_cast<const T*>(operands.x)),
        residual(static_cast<const T*>(operands.residual)),
        y(static_cast<T*>(operands.out)),
        act(operands) {}

  BNEXT_INLINE void fetch_at(int64_t reduced, int64_t mapped) const {
    fetch(x + reduced);
    if (added()) fetch(residual + mapped);
  }
  BNEXT_INLINE bool added() const { return Act::kAny ? residual != nullptr : kBeside == Beside::residual; }

  template <class Span>
  BNEXT_INLINE void step(Bits& bits, int64_t offset, const Coefficients<Math, kCoefficients>& c,
                         Span span) const {
    Lanes<Math> z = normalize(span.template load_lanes<Math>(x + offset), c.k[0], c.k[1], c.k[2]);
    if (added()) z = z + span.template load_lanes<Math>(residual + offset);
    if constexpr (kMasked) {
      if (bits.wanted()) bits.append(span.fresh(act.passes(z)), span.count());
    }
    span.store_lanes(y + offset, act.value(z));
  }
};

// Coefficients: scale; center; with kFromInput scale and offset of z; slope and offset.
template <class T, class Slope>
struct InputGradMap {
  using Storage = T;
  using Math = opmath_t<T>;
  using Bits = NoBits;
  static constexpr int kRest = Slope::kFromInput ? 4 : 2, kCoefficients = kRest + 2;
  Gradient<T, Slope> gradient;

  explicit InputGradMap(const Operands& operands) : gradient(operands, !operands.dresidual_first) {}

  BNEXT_INLINE void fetch_at(int64_t reduced, int64_t) const { gradient.fetch_at(reduced); }

  template <class Span>
  BNEXT_INLINE void step(Bits&, int64_t offset, const Coefficients<Math, kCoefficients>& c, Span span) const {
    Lanes<Math> dz, value;
    gradient.load(dz, value, offset, c.k + 1, span);
    gradient.store(offset, input_grad(dz, value, c.k[0], c.k[1], c.k[kRest], c.k[kRest + 1]), dz, span);
  }
};

// dx with fixed statistics, where no sums are wanted and dz is found without x.
template <class T, class Slope>
struct ScaleMap {
  using Storage = T;
  using Math = opmath_t<T>;
  using Bits = NoBits;
  static constexpr int kCoefficients = 1;
  const T* dy;
  T* dx;
  T* dresidual;
  Slope slope;

  explicit ScaleMap(const Operands& operands)
      : dy(static_cast<const T*>(operands.dy)),
        dx(static_cast<T*>(operands.out)),
        dresidual(static_cast<T*>(operands.dresidual)),
        slope(operands) {}

  BNEXT_INLINE void fetch_at(int64_t, int64_t mapped) const { fetch(dy + mapped); }

  template <class Span>
  BNEXT_INLINE void step(Bits&, int64_t offset, const Coefficients<Math, 1>& c, Span span) const {
    Lanes<Math> dz = span.template load_lanes<Math>(dy + offset);
    if constexpr (Slope::kActive) slope.apply(span, offset, dz);
    span.store_lanes(dx + offset, fixed_input_grad(dz, c.k[0]));
    if constexpr (Slope::kResidual) {
      if (dresidual != nullptr) span.store_lanes(dresidual + offset, dz);
    }
  }
};

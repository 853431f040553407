// What happens to sixteen elements: two reducers and two maps, templates over the storage type.
//
// Included once per instruction set (see vector.h). A step takes the element offset and says by its Span how
// many lanes count: Full, or First{n} where fewer than sixteen elements are left.

struct Full {
  template <class A, class T>
  BNEXT_INLINE Lanes<A> load_lanes(const T* p) const {
    return load<A>(p);
  }
  template <class T, class A>
  BNEXT_INLINE Lanes<A> keep(const Lanes<A>& v) const {
    return v;
  }
  template <bool Streaming, class A, class T>
  BNEXT_INLINE void store_lanes(T* p, const Lanes<A>& v) const {
    store<Streaming>(p, v);
  }
};

struct First {
  int64_t n;
  bool readable;  // sixteen elements may be read

  template <class A, class T>
  BNEXT_INLINE Lanes<A> load_lanes(const T* p) const {
    return load_first<A>(p, n, readable);
  }
  template <class T, class A>
  BNEXT_INLINE Lanes<A> keep(const Lanes<A>& v) const {
    return keep_first<T>(v, n);
  }
  template <bool Streaming, class A, class T>
  BNEXT_INLINE void store_lanes(T* p, const Lanes<A>& v) const {
    store_first(p, v, n);
  }
};

// The n elements that are left of sixteen or more: the sixteen that end with them, most of which were seen
// before. Maps write those once more, so their output must not be their input.
struct Last {
  int64_t n;

  template <class A, class T>
  BNEXT_INLINE Lanes<A> load_lanes(const T* p) const {
    return load<A>(p + n - kLanes);
  }
  template <class T, class A>
  BNEXT_INLINE Lanes<A> keep(const Lanes<A>& v) const {
    return keep_last<T>(v, n);
  }
  template <bool, class A, class T>
  BNEXT_INLINE void store_lanes(T* p, const Lanes<A>& v) const {
    store(p + n - kLanes, v);
  }
};

template <class A>
struct LaneSums {
  Lanes<A> first, second;
};

// Reducers: coefficients 0 is the center, what is subtracted from x.
template <class T>
struct MomentsReducer {
  using Storage = T;
  using Math = summath_t<T>;
  static constexpr int kCoefficients = 1;
  const T* x;

  BNEXT_INLINE void prefetch(int64_t offset) const { __builtin_prefetch(x + offset); }

  explicit MomentsReducer(const Operands& operands) : x(static_cast<const T*>(operands.x)) {}

  template <class Span>
  BNEXT_INLINE void step(LaneSums<Math>& sums, int64_t offset, const Coefficients<Math, 1>& c,
                         Span span) const {
    const Lanes<Math> d = span.template keep<T>(span.template load_lanes<Math>(x + offset) - c.k[0]);
    sums.first = sums.first + d;
    sums.second = sums.second + d * d;
  }
};

// With an activation 1 and 2 are scale and offset of its input z, which is computed again, in the precision
// of the forward pass: what the mask says must be what it said there.
template <class T, class Act>
struct GradSumsReducer {
  using Storage = T;
  using Math = std::conditional_t<Act::kActive, opmath_t<T>, summath_t<T>>;
  static constexpr int kCoefficients = Act::kActive ? 3 : 1;
  const T* x;
  const T* dy;
  Act act;

  BNEXT_INLINE void prefetch(int64_t offset) const {
    __builtin_prefetch(x + offset);
    __builtin_prefetch(dy + offset);
  }

  explicit GradSumsReducer(const Operands& operands)
      : x(static_cast<const T*>(operands.x)), dy(static_cast<const T*>(operands.dy)), act(operands) {}

  template <class Span>
  BNEXT_INLINE void step(LaneSums<Math>& sums, int64_t offset, const Coefficients<Math, kCoefficients>& c,
                         Span span) const {
    Lanes<Math> dz = span.template load_lanes<Math>(dy + offset);
    const Lanes<Math> value = span.template load_lanes<Math>(x + offset);
    if constexpr (Act::kActive) dz = act.grad(dz, normalize(value, c.k[0], c.k[1], c.k[2]));
    dz = span.template keep<T>(dz);
    const Lanes<Math> d = span.template keep<T>(value - c.k[0]);
    sums.first = sums.first + dz;
    sums.second = sums.second + dz * d;
  }
};

template <class T, class Act, bool Streaming>
struct NormalizeMap {
  using Storage = T;
  using Math = opmath_t<T>;
  static constexpr bool kStreaming = Streaming;
  static constexpr int kCoefficients = 3;
  const T* x;
  T* y;
  Act act;

  explicit NormalizeMap(const Operands& operands)
      : x(static_cast<const T*>(operands.x)), y(static_cast<T*>(operands.out)), act(operands) {}

  BNEXT_INLINE void prefetch(int64_t offset) const { __builtin_prefetch(x + offset); }

  template <class Span>
  BNEXT_INLINE void step(int64_t offset, const Coefficients<Math, kCoefficients>& c, Span span) const {
    span.template store_lanes<Streaming>(
        y + offset, act.value(normalize(span.template load_lanes<Math>(x + offset), c.k[0], c.k[1], c.k[2])));
  }
};

// Coefficients: scale; center; with an activation scale and offset of its input; slope and offset. Fixed
// statistics have no slope and no offset, and without an activation they do not read x.
template <class T, class Act, bool Fixed, bool Streaming>
struct InputGradMap {
  using Storage = T;
  using Math = opmath_t<T>;
  static constexpr bool kStreaming = Streaming, kReadsX = Act::kActive || !Fixed;
  static constexpr int kRest = Act::kActive ? 4 : 2;
  static constexpr int kCoefficients = Fixed ? (Act::kActive ? 4 : 1) : kRest + 2;
  const T* x;
  const T* dy;
  T* dx;
  Act act;

  explicit InputGradMap(const Operands& operands)
      : x(static_cast<const T*>(operands.x)),
        dy(static_cast<const T*>(operands.dy)),
        dx(static_cast<T*>(operands.out)),
        act(operands) {}

  BNEXT_INLINE void prefetch(int64_t offset) const {
    if constexpr (kReadsX) __builtin_prefetch(x + offset);
    __builtin_prefetch(dy + offset);
  }

  template <class Span>
  BNEXT_INLINE void step(int64_t offset, const Coefficients<Math, kCoefficients>& c, Span span) const {
    Lanes<Math> dz = span.template load_lanes<Math>(dy + offset);
    if constexpr (!kReadsX) {
      span.template store_lanes<Streaming>(dx + offset, dz * c.k[0]);
    } else {
      const Lanes<Math> value = span.template load_lanes<Math>(x + offset);
      if constexpr (Act::kActive) dz = act.grad(dz, normalize(value, c.k[1], c.k[2], c.k[3]));
      if constexpr (Fixed) {
        span.template store_lanes<Streaming>(dx + offset, dz * c.k[0]);
      } else {
        span.template store_lanes<Streaming>(
            dx + offset, input_grad(dz, value, c.k[0], c.k[1], c.k[kRest], c.k[kRest + 1]));
      }
    }
  }
};

// How many of a step's sixteen lanes count, and how results are stored: Full, or First{n} where fewer than
// sixteen elements are left.
//
// Included once per instruction set (see vector.h), after load_store.h.

// begin(offset): the element of the first lane. count() elements are new; fresh(bits) are their bits.
struct Full {
  bool streaming = false;  // results go past the cache

  BNEXT_INLINE int64_t begin(int64_t offset) const { return offset; }
  BNEXT_INLINE int count() const { return kLanes; }
  BNEXT_INLINE uint32_t fresh(uint32_t bits) const { return bits; }
  template <class A, class T>
  BNEXT_INLINE Lanes<A> load_lanes(const T* p) const {
    return load<A>(p);
  }
  template <class T, class A>
  BNEXT_INLINE Lanes<A> keep(const Lanes<A>& v) const {
    return v;
  }
  template <class A, class T>
  BNEXT_INLINE void store_lanes(T* p, const Lanes<A>& v) const {
    store(p, v, streaming);
  }
};

struct First {
  int64_t n;
  bool readable;  // sixteen elements may be read

  BNEXT_INLINE int64_t begin(int64_t offset) const { return offset; }
  BNEXT_INLINE int count() const { return static_cast<int>(n); }
  BNEXT_INLINE uint32_t fresh(uint32_t bits) const { return bits & ((1u << n) - 1); }
  template <class A, class T>
  BNEXT_INLINE Lanes<A> load_lanes(const T* p) const {
    return load_first<A>(p, n, readable);
  }
  template <class T, class A>
  BNEXT_INLINE Lanes<A> keep(const Lanes<A>& v) const {
    return keep_first<T>(v, n);
  }
  template <class A, class T>
  BNEXT_INLINE void store_lanes(T* p, const Lanes<A>& v) const {
    store_first(p, v, n);
  }
};

// The n elements that are left of sixteen or more, of reducers alone: the sixteen that end with them, most of
// which were seen before. What a reducer writes it writes once more.
struct Last {
  int64_t n;

  BNEXT_INLINE int64_t begin(int64_t offset) const { return offset + n - kLanes; }
  template <class A, class T>
  BNEXT_INLINE Lanes<A> load_lanes(const T* p) const {
    return load<A>(p + n - kLanes);
  }
  template <class T, class A>
  BNEXT_INLINE Lanes<A> keep(const Lanes<A>& v) const {
    return keep_last<T>(v, n);
  }
  template <class A, class T>
  BNEXT_INLINE void store_lanes(T* p, const Lanes<A>& v) const {
    store(p + n - kLanes, v);
  }
};

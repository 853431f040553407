// Sixteen lanes from and to memory, in any storage type; the order of lanes; the first and the last of
// sixteen.
//
// Included once per instruction set, after vector.h.

// Lanes of T need not lie in memory order: bfloat16 with 32-byte vectors is taken apart into even and odd
// elements.
template <class T>
constexpr bool kEvenOdd = false;
#if BNEXT_VECTOR_BYTES == 32
template <>
constexpr bool kEvenOdd<bf16> = true;
#endif

template <class T>
BNEXT_INLINE Lanes<float> in_memory_order(const Lanes<float>& v) {
#if BNEXT_VECTOR_BYTES == 32
  if constexpr (kEvenOdd<T>) {
    const __m256 even = (__m256)v.part[0], odd = (__m256)v.part[1];
    const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    return {{(Native<float>)_mm256_permute2f128_ps(low, high, 0x20),
             (Native<float>)_mm256_permute2f128_ps(low, high, 0x31)}};
  }
#endif
  return v;
}
template <class T>
BNEXT_INLINE Lanes<double> in_memory_order(const Lanes<double>& v) {
  return v;
}

template <class T>
BNEXT_INLINE Lanes<float> in_lane_order(const Lanes<float>& v) {
#if BNEXT_VECTOR_BYTES == 32
  if constexpr (kEvenOdd<T>) {
    const __m256 first = (__m256)v.part[0], second = (__m256)v.part[1];
    const __m256 low = _mm256_permute2f128_ps(first, second, 0x20);
    const __m256 high = _mm256_permute2f128_ps(first, second, 0x31);
    return {{(Native<float>)_mm256_shuffle_ps(low, high, 0x88),
             (Native<float>)_mm256_shuffle_ps(low, high, 0xdd)}};
  }
#endif
  return v;
}
template <class T>
BNEXT_INLINE Lanes<double> in_lane_order(const Lanes<double>& v) {
  return v;
}

template <class A>
BNEXT_INLINE Native<A> load_part(const A* p) {
  return load_native<Native<A>>(p);
}
template <class A>
  requires(sizeof(A) == sizeof(double))
BNEXT_INLINE Native<A> load_part(const float* p) {
  return widen_float(p);
}
template <class A>
BNEXT_INLINE Native<float> load_part(const f16* p) {
  return widen_half(p);
}

template <class A, class T>
BNEXT_INLINE Lanes<A> load(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    return load_bf16(p);
  } else {
    return generate<A>(
        [&](auto i) __attribute__((always_inline)) { return load_part<A>(p + i.value * Lanes<A>::kWidth); });
  }
}

// By the hint that names the cache. On Zen 4, with 32 KB of L1, fetches into it gain nothing (two threads
// that read parts of rows: 16 GB/s with and without), fetches into L2 do (25 to 33 GB/s). On Zen 5, with 48
// KB, reducers that fetch into L1 make backward 1.0 to 1.25 times as fast as with L2, forward up to 1.1
// times; maps gain nothing and lose up to a quarter.
enum class Cache { l1, l2 };
template <Cache C = Cache::l2>
BNEXT_INLINE void fetch(const void* p) {
  __builtin_prefetch(p, 0, C == Cache::l1 ? 3 : 2);
}

// Fetched ahead of a walk in memory order: of each tensor, for L2 holds many of that; for L1 of all of them.
constexpr int64_t kFetchBytes = 16 << 10;

struct VectorStore {
  bool streaming;

  template <class V>
  BNEXT_INLINE void operator()(void* p, V v) const {
    if (unlikely(streaming)) {
      store_native_streaming(p, v);
    } else {
      store_native(p, v);
    }
  }
};

template <class A, class Store, int... I>
BNEXT_INLINE void store_parts(A* p, const Lanes<A>& v, Store store_vector, Indices<I...>) {
  (store_vector(p + I * Lanes<A>::kWidth, v.part[I]), ...);
}
template <class A>
BNEXT_INLINE void store(A* p, const Lanes<A>& v, bool streaming = false) {
  store_parts(p, v, VectorStore{streaming}, typename CountTo<Lanes<A>::kParts>::type{});
}
BNEXT_INLINE void store(bf16* p, const Lanes<float>& v, bool streaming = false) {
  store_bf16(p, v, VectorStore{streaming});
}
BNEXT_INLINE void store(f16* p, const Lanes<float>& v, bool streaming = false) {
  store_half(p, v, VectorStore{streaming});
}

// Orders streaming stores before whatever the next tile, thread or operator does.
BNEXT_INLINE void streaming_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The lanes where keep(index of the element) holds, zero elsewhere.
template <class T, class A, class F>
BNEXT_INLINE Lanes<A> keep_where(const Lanes<A>& v, F keep) {
  alignas(64) const A iota[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Lanes<A> index = in_lane_order<T>(load<A>(iota));
  return generate<A>([&](auto i) __attribute__((always_inline)) {
    return keep(index.part[i.value]) ? v.part[i.value] : Native<A>{};
  });
}
template <class T, class A>
BNEXT_INLINE Lanes<A> keep_first(const Lanes<A>& v, int64_t n) {
  const Native<A> bound = static_cast<A>(n) - Native<A>{};
  return keep_where<T>(v, [&](auto index) __attribute__((always_inline)) { return index < bound; });
}
template <class T, class A>
BNEXT_INLINE Lanes<A> keep_last(const Lanes<A>& v, int64_t n) {
  const Native<A> bound = static_cast<A>(kLanes - n) - Native<A>{};
  return keep_where<T>(v, [&](auto index) __attribute__((always_inline)) { return index >= bound; });
}

// Called, for it is rare and would be most of the code.
template <class T>
__attribute__((noinline)) void copy_first(T* to, const T* from, int64_t n) {
  for (int64_t k = 0; k < n; ++k) to[k] = from[k];
}

// The first n < 16 elements; lanes above are unspecified if 16 may be read, else zero.
template <class A, class T>
BNEXT_INLINE Lanes<A> load_first(const T* p, int64_t n, bool readable) {
  if (readable) return load<A>(p);
  T buffer[kLanes] = {};
  copy_first(buffer, p, n);
  return load<A>(buffer);
}
template <class A, class T>
BNEXT_INLINE void store_first(T* p, const Lanes<A>& v, int64_t n) {
  T buffer[kLanes];
  store(buffer, v);
  copy_first(p, buffer, n);
}

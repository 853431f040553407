// Sixteen lanes of arithmetic on whatever vectors the including file was compiled for.
//
// Included once per instruction set by tiles.inc, inside its namespace, with BNEXT_VECTOR_BYTES set to the
// register width. The lane count never changes, so sums have the same partition on every machine. No include
// guard, no includes: everything here must be compiled for one instruction set and must not leak into
// another.

constexpr int kLanes = 16;
constexpr int kBytes = BNEXT_VECTOR_BYTES;

#define BNEXT_INLINE __attribute__((always_inline)) inline

// Inside a loop, of what holds for a whole call whose tensors are beyond the cache: the compiler puts it
// aside, for three jumps to sixteen elements took as long as their arithmetic.
BNEXT_INLINE bool unlikely(bool condition) { return __builtin_expect(condition, false); }

template <class E, int Bytes>
struct NativeVector {
  typedef E type __attribute__((vector_size(Bytes)));
};
template <class E, int Bytes = kBytes>
using Native = typename NativeVector<E, Bytes>::type;

template <class A>
struct Lanes {
  static constexpr int kWidth = kBytes / sizeof(A);
  static constexpr int kParts = kLanes / kWidth;
  Native<A> part[kParts];
};

template <int N>
struct Index {
  static constexpr int value = N;
};

// f(Index<whether the condition holds>), compiled for either answer: a loop in it has no test, and no more
// registers than it needs.
template <class F>
BNEXT_INLINE void for_either(bool condition, F f) {
  if (condition) {
    f(Index<1>{});
  } else {
    f(Index<0>{});
  }
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
  using type = Indices<I...>;
};

// Lanes from a function of the part's index; unrolled in the front end so that parts live in registers.
template <class A, class F, int... I>
BNEXT_INLINE Lanes<A> generate_parts(F f, Indices<I...>) {
  return {{f(Index<I>{})...}};
}
template <class A, class F>
BNEXT_INLINE Lanes<A> generate(F f) {
  return generate_parts<A>(f, typename CountTo<Lanes<A>::kParts>::type{});
}

template <class A>
BNEXT_INLINE Lanes<A> operator+(const Lanes<A>& a, const Lanes<A>& b) {
  return generate<A>([&](auto i)
                         __attribute__((always_inline)) { return a.part[i.value] + b.part[i.value]; });
}
template <class A>
BNEXT_INLINE Lanes<A> operator-(const Lanes<A>& a, const Lanes<A>& b) {
  return generate<A>([&](auto i)
                         __attribute__((always_inline)) { return a.part[i.value] - b.part[i.value]; });
}
template <class A>
BNEXT_INLINE Lanes<A> operator*(const Lanes<A>& a, const Lanes<A>& b) {
  return generate<A>([&](auto i)
                         __attribute__((always_inline)) { return a.part[i.value] * b.part[i.value]; });
}

template <class A>
BNEXT_INLINE Lanes<A> splat(A value) {
  return generate<A>([&](auto) __attribute__((always_inline)) { return value - Native<A>{}; });
}

// f(Index<0>), f(Index<1>) and so on, unrolled.
template <class F, int... I>
BNEXT_INLINE void for_each_index(F f, Indices<I...>) {
  (f(Index<I>{}), ...);
}

// A map's coefficients for sixteen lanes; made in one expression, so that they live in registers.
template <class A, int N>
struct Coefficients {
  Lanes<A> k[N];
};
template <class A, class F, int... I>
BNEXT_INLINE Coefficients<A, sizeof...(I)> coefficients_from(F f, Indices<I...>) {
  return {{f(I)...}};
}

template <class V>
BNEXT_INLINE V load_native(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
BNEXT_INLINE void store_native(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Of the same width as A.
template <class A>
using Integer = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

// ---- what differs between instruction sets ----
// lane_bits: bit i for lane i of one part, whose lanes are all ones or zero.
// widen_float: kWidth floats to double.      widen_half: one part from float16.
// store_native_streaming: past the cache, p aligned to the vector.
// load_bf16, store_bf16, store_half: sixteen lanes from and to 16-bit storage, bfloat16 in lane order.

#if BNEXT_VECTOR_BYTES == 64

BNEXT_INLINE uint32_t lane_bits(Native<int32_t> v) { return _mm512_movepi32_mask((__m512i)v); }
BNEXT_INLINE uint32_t lane_bits(Native<int64_t> v) { return _mm512_movepi64_mask((__m512i)v); }
BNEXT_INLINE Native<float> select_native(uint32_t bits, Native<float> yes, Native<float> no) {
  return (Native<float>)_mm512_mask_blend_ps(static_cast<__mmask16>(bits), (__m512)no, (__m512)yes);
}
BNEXT_INLINE Native<double> select_native(uint32_t bits, Native<double> yes, Native<double> no) {
  return (Native<double>)_mm512_mask_blend_pd(static_cast<__mmask8>(bits), (__m512d)no, (__m512d)yes);
}
BNEXT_INLINE Native<double> widen_float(const float* p) {
  return (Native<double>)_mm512_cvtps_pd(_mm256_loadu_ps(p));
}
BNEXT_INLINE Native<float> widen_half(const void* p) {
  return (Native<float>)_mm512_cvtph_ps(load_native<__m256i>(p));
}
template <class V>
BNEXT_INLINE void store_native_streaming(void* p, V v) {
  if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
  } else {
    _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
  }
}
template <class Store>
BNEXT_INLINE void store_half(void* p, const Lanes<float>& v, Store store_vector) {
  store_vector(p, _mm512_cvtps_ph((__m512)v.part[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Words to and from the upper halves of lanes: one permutation in place of a shift and a conversion.
BNEXT_INLINE Lanes<float> load_bf16(const void* p) {
  Native<uint16_t> spread;
  for (int k = 0; k < 32; ++k) spread[k] = static_cast<uint16_t>(k / 2);
  const __m512i words = _mm512_castsi256_si512(load_native<__m256i>(p));
  return {{(Native<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)spread, words)}};
}
// round_bf16 in three instructions instead of four: one more where the last bit that stays is set.
template <class Store>
BNEXT_INLINE void store_bf16(void* p, const Lanes<float>& v, Store store_vector) {
  Native<uint16_t> upper;
  for (int k = 0; k < 32; ++k) upper[k] = static_cast<uint16_t>(k % 16 * 2 + 1);
  const __m512i bits = (__m512i)v.part[0], below_half = _mm512_set1_epi32(0x7fff);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1 << 16));
  const __m512i even = _mm512_add_epi32(bits, below_half);
  const __m512i rounded = _mm512_mask_sub_epi32(even, odd, even, _mm512_set1_epi32(-1));
  store_vector(p, _mm512_castsi512_si256(_mm512_permutexvar_epi16((__m512i)upper, rounded)));
}

#elif BNEXT_VECTOR_BYTES == 32

BNEXT_INLINE uint32_t lane_bits(Native<int32_t> v) {
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)v));
}
BNEXT_INLINE uint32_t lane_bits(Native<int64_t> v) {
  return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)v));
}
BNEXT_INLINE Native<double> widen_float(const float* p) {
  return (Native<double>)_mm256_cvtps_pd(_mm_loadu_ps(p));
}
BNEXT_INLINE Native<float> widen_half(const void* p) {
  return (Native<float>)_mm256_cvtph_ps(load_native<__m128i>(p));
}
template <class V>
BNEXT_INLINE void store_native_streaming(void* p, V v) {
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
}
// Even elements, then odd ones: a shift and a mask instead of instructions that cross lanes.
BNEXT_INLINE Lanes<float> load_bf16(const void* p) {
  const auto pairs = load_native<Native<uint32_t>>(p);
  return {{(Native<float>)(pairs << 16), (Native<float>)(pairs & 0xffff0000u)}};
}
// round_bf16 for all words at once, in 9 instructions instead of 11: one more where the lower word is above
// half, or half and the upper one odd. Compared as signed words, half being 0.
template <class Store>
BNEXT_INLINE void store_bf16(void* p, const Lanes<float>& v, Store store_vector) {
  const __m256i even = (__m256i)v.part[0], odd = (__m256i)v.part[1];
  const __m256i upper = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
  const __m256i lower = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa);
  const __m256i from_half = _mm256_xor_si256(lower, _mm256_set1_epi16(INT16_MIN));
  const __m256i odd_counts = _mm256_adds_epi16(from_half, _mm256_and_si256(upper, _mm256_set1_epi16(1)));
  const __m256i more = _mm256_cmpgt_epi16(odd_counts, _mm256_setzero_si256());  // ones, which is -1
  store_vector(p, _mm256_sub_epi16(upper, more));
}
template <class Store>
BNEXT_INLINE void store_half(void* p, const Lanes<float>& v, Store store_vector) {
  const __m128i low = _mm256_cvtps_ph((__m256)v.part[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m128i high = _mm256_cvtps_ph((__m256)v.part[1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  store_vector(p, _mm256_set_m128i(high, low));
}

#else

template <class V>
BNEXT_INLINE uint32_t lane_bits(V v) {
  uint32_t bits = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) bits |= static_cast<uint32_t>(v[i] & 1) << i;
  return bits;
}
BNEXT_INLINE Native<double> widen_float(const float* p) {
  return __builtin_convertvector((load_native<Native<float, kBytes / 2>>(p)), Native<double>);
}
BNEXT_INLINE Native<uint32_t> widen_u16(const void* p) {
  return __builtin_convertvector((load_native<Native<uint16_t, kBytes / 2>>(p)), Native<uint32_t>);
}
BNEXT_INLINE Native<float> widen_half(const void* p) { return widen_f16<Native<float>>(widen_u16(p)); }
template <class V>
BNEXT_INLINE void store_native_streaming(void* p, V v) {
#if defined(__x86_64__)
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#else
  store_native(p, v);
#endif
}
template <class Store>
BNEXT_INLINE void store_u16(void* p, const Lanes<uint32_t>& v, Store store_vector) {
  for (int i = 0; i < Lanes<uint32_t>::kParts; i += 2) {
    const auto low = (Native<uint16_t>)v.part[i], high = (Native<uint16_t>)v.part[i + 1];
    store_vector(static_cast<char*>(p) + i * (kBytes / 2),
                 __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14));  // lower halves first
  }
}
BNEXT_INLINE Lanes<float> load_bf16(const void* p) {
  return generate<float>([&](auto i) __attribute__((always_inline)) {
    return widen_bf16<Native<float>>(widen_u16(static_cast<const bf16*>(p) + i.value * Lanes<float>::kWidth));
  });
}
template <class Store>
BNEXT_INLINE void store_bf16(void* p, const Lanes<float>& v, Store store_vector) {
  const auto bits = generate<uint32_t>([&](auto i) __attribute__((always_inline)) {
    return round_bf16<Native<uint32_t>>(v.part[i.value]) >> 16;
  });
  store_u16(p, bits, store_vector);
}
// Called: without an instruction for it the code would be a third larger.
__attribute__((noinline)) Native<uint32_t> narrow_half(Native<float> v) {
  return narrow_f16<Native<uint32_t>>(v);
}
template <class Store>
BNEXT_INLINE void store_half(void* p, const Lanes<float>& v, Store store_vector) {
  const auto bits =
      generate<uint32_t>([&](auto i) __attribute__((always_inline)) { return narrow_half(v.part[i.value]); });
  store_u16(p, bits, store_vector);
}

#endif

// Sixteen bits of a mask (see args.h) from and to lanes of T, and a writer of many.
//
// Included once per instruction set, after load_store.h.

// The element of a lane, as load_store.h orders them.
template <class T, class A>
constexpr int element_of(int part, int lane) {
  return kEvenOdd<T> ? 2 * lane + part : part * Lanes<A>::kWidth + lane;
}

// Bit i for element i where holds(part of v).
template <class T, class A, class F>
BNEXT_INLINE uint32_t bits_where(const Lanes<A>& v, F holds) {
#if BNEXT_VECTOR_BYTES == 32
  if constexpr (kEvenOdd<T>) {  // sixteen halves, ones or zero, in memory order; then bytes
    const __m256i even = (__m256i)holds(v.part[0]), odd = (__m256i)holds(v.part[1]);
    const __m256i halves = _mm256_blend_epi16(even, odd, 0xaa);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    return static_cast<uint32_t>(_mm_movemask_epi8(bytes));
  }
#endif
  uint32_t bits = 0;
  for_each_index(
      [&](auto i) __attribute__((always_inline)) {
        bits |= lane_bits((Native<Integer<A>>)holds(v.part[i.value])) << i.value * Lanes<A>::kWidth;
      },
      typename CountTo<Lanes<A>::kParts>::type{});
  return bits;
}

// Elements of `yes` where their bit is set, of `no` elsewhere.
template <class T, class A>
BNEXT_INLINE Lanes<A> select(uint32_t bits, const Lanes<A>& yes, const Lanes<A>& no) {
  return generate<A>([&](auto i) __attribute__((always_inline)) {
#if BNEXT_VECTOR_BYTES == 64
    return select_native(bits >> i.value * Lanes<A>::kWidth, yes.part[i.value], no.part[i.value]);
#else
    using V = Native<Integer<A>>;
    V mine;
    for (int lane = 0; lane < Lanes<A>::kWidth; ++lane) mine[lane] = 1 << element_of<T, A>(i.value, lane);
    return ((static_cast<Integer<A>>(bits) - V{}) & mine) != V{} ? yes.part[i.value] : no.part[i.value];
#endif
  });
}

// Bit i of element + i, for sixteen; those above are anything. Four bytes that begin with the first bit's are
// in the mask.
BNEXT_INLINE uint32_t read_bits(const void* mask, int64_t element) {
  const auto at = static_cast<uint64_t>(element);
  uint32_t word;
  __builtin_memcpy(&word, static_cast<const char*>(mask) + at / 8, sizeof word);
  return word >> at % 8;
}

// Bits of consecutive elements, stretch by stretch, beside other threads' stretches: whole words are stored,
// the first and the last, which others may share, are added to zeros.
class BitWriter {
 public:
  explicit BitWriter(void* mask) : mask_(static_cast<uint16_t*>(mask)) {}

  bool wanted() const { return mask_ != nullptr; }

  BNEXT_INLINE void seek(int64_t element) {
    if (mask_ == nullptr || element == next_) return;
    finish();
    next_ = element;
    word_ = mask_ + element / 16;
    held_ = static_cast<int>(element % 16);
    shared_ = held_ != 0;
  }

  BNEXT_INLINE void append(uint32_t bits, int count) {
    if (held_ == 0 && count == 16) {  // on boundaries of words, as most stretches are
      *word_++ = static_cast<uint16_t>(bits);
      next_ += 16;
      return;
    }
    pending_ |= bits << held_;
    held_ += count;
    next_ += count;
    if (held_ < 16) return;
    if (shared_) {
      add();
    } else {
      *word_ = static_cast<uint16_t>(pending_);
    }
    shared_ = false;
    ++word_;
    pending_ >>= 16;
    held_ -= 16;
  }

  BNEXT_INLINE void finish() {
    if (held_ != 0 && pending_ != 0) add();
    pending_ = 0;
    held_ = 0;
    next_ = -1;
  }

 private:
  BNEXT_INLINE void add() { __atomic_fetch_or(word_, static_cast<uint16_t>(pending_), __ATOMIC_RELAXED); }

  uint16_t* mask_;
  uint16_t* word_ = nullptr;
  int64_t next_ = -1;
  uint32_t pending_ = 0;
  int held_ = 0;  // bits in pending_, and those of the word before the stretch
  bool shared_ = false;
};

// In its place where a map writes no mask.
struct NoBits {
  explicit NoBits(void*) {}
  static constexpr bool wanted() { return false; }
  void seek(int64_t) {}
  void finish() {}
};

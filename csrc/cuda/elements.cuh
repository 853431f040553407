// Vectors of sixteen bytes as elements: out of them and back, in arithmetic precision and bit by bit.
#pragma once

#include "cuda/primitives.cuh"

namespace bnext::cuda {

template <class T>
constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

// Element `lane` in arithmetic precision.
template <class T>
BNEXT_DEVICE opmath_t<T> element(const Vector16& v, int lane) {
  if constexpr (sizeof(T) == 8) {
    return bits_as<double>(uint64_t{v.word[2 * lane + 1]} << 32 | v.word[2 * lane]);
  } else if constexpr (sizeof(T) == 4) {
    return bits_as<float>(v.word[lane]);
  } else {
    const uint32_t pair = v.word[lane / 2];
    if constexpr (std::is_same_v<T, bf16>) {
      return bits_as<float>(lane % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
    } else {
      return widen_half(lane % 2 == 0 ? pair & 0xffffu : pair >> 16);
    }
  }
}

template <class T>
BNEXT_DEVICE Vector16 pack(const opmath_t<T> (&values)[kLanes<T>]) {
  Vector16 v;
  BNEXT_UNROLL
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 8) {
      const uint64_t bits = bits_as<uint64_t>(values[w / 2]);
      v.word[w] = static_cast<uint32_t>(w % 2 == 0 ? bits : bits >> 32);
    } else if constexpr (sizeof(T) == 4) {
      v.word[w] = bits_as<uint32_t>(values[w]);
    } else {
      v.word[w] = narrow_to(values[2 * w], T{}) | narrow_to(values[2 * w + 1], T{}) << 16;
    }
  }
  return v;
}

// The bits of one element, and a vector with them in place of its own.
template <class T>
using bits_t =
    std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

template <class T>
BNEXT_DEVICE bits_t<T> element_bits(const Vector16& v, int lane) {
  if constexpr (sizeof(T) == 8) {
    return uint64_t{v.word[2 * lane + 1]} << 32 | v.word[2 * lane];
  } else if constexpr (sizeof(T) == 4) {
    return v.word[lane];
  } else {
    return static_cast<uint16_t>(v.word[lane / 2] >> (lane % 2 * 16));
  }
}

template <class T>
BNEXT_DEVICE void set_element_bits(Vector16& v, int lane, bits_t<T> bits) {
  if constexpr (sizeof(T) == 8) {
    v.word[2 * lane] = static_cast<uint32_t>(bits);
    v.word[2 * lane + 1] = static_cast<uint32_t>(bits >> 32);
  } else if constexpr (sizeof(T) == 4) {
    v.word[lane] = bits;
  } else {
    const int shift = lane % 2 * 16;
    v.word[lane / 2] = (v.word[lane / 2] & ~(0xffffu << shift)) | static_cast<uint32_t>(bits) << shift;
  }
}

template <class T>
BNEXT_DEVICE void set_element(Vector16& v, int lane, opmath_t<T> value) {
  if constexpr (sizeof(T) == 2) {
    set_element_bits<T>(v, lane, static_cast<uint16_t>(narrow_to(value, T{})));
  } else {
    set_element_bits<T>(v, lane, bits_as<bits_t<T>>(value));
  }
}

// The sixteen bytes from `shift` on of two vectors that follow one another.
BNEXT_DEVICE Vector16 shifted(const Vector16& low, const Vector16& high, unsigned shift) {
  uint32_t word[8];
  BNEXT_UNROLL
  for (int k = 0; k < 4; ++k) {
    word[k] = low.word[k];
    word[k + 4] = high.word[k];
  }
  BNEXT_UNROLL
  for (int step = 2; step > 0; --step) {  // by two words, by one
    BNEXT_UNROLL
    for (int k = 0; k + step < 8; ++k) word[k] = (shift >> 2 & step) != 0 ? word[k + step] : word[k];
  }
  Vector16 v;
  BNEXT_UNROLL
  for (int k = 0; k < 4; ++k) {
    v.word[k] = static_cast<uint32_t>((uint64_t{word[k + 1]} << 32 | word[k]) >> (shift % 4 * 8));
  }
  return v;
}

}  // namespace bnext::cuda

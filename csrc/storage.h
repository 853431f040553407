// Storage types and the arithmetic type that belongs to each, for host and device.
//
// The bit conversions are templates over the carrier: U is uint32_t or a vector of them, F the float (vector)
// of the same lanes, so that scalar code and vector code share one algorithm. They use integer and
// normal-number arithmetic only, hence give the same result under flush-to-zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define BNEXT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BNEXT_HOST_DEVICE __attribute__((always_inline)) inline
#endif

namespace bnext {

enum class Dtype : uint8_t { float32, float64, bfloat16, float16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// Arithmetic per element: float, except for double.
template <class T>
struct OpMath {
  using type = float;
};
template <>
struct OpMath<double> {
  using type = double;
};
template <class T>
using opmath_t = typename OpMath<T>::type;

constexpr int64_t opmath_bytes(Dtype dtype) { return dtype == Dtype::float64 ? 8 : 4; }

// a * b + c. Of scalars, which kernels for a GPU compute with, rounded once; of vectors as the instruction
// set has it.
template <class V>
BNEXT_HOST_DEVICE V multiply_add(const V& a, const V& b, const V& c) {
  if constexpr (std::is_floating_point_v<V>) {
    return std::fma(a, b, c);
  } else {
    return a * b + c;
  }
}

// Elements that are added up in the arithmetic type before their sum is added to a double: what float loses
// over so few is below the rounding of one element, and over many batches it averages out.
template <class T>
constexpr int kBatch = 8;
template <>
inline constexpr int kBatch<bf16> = 32;
template <>
inline constexpr int kBatch<f16> = 32;

// Bits of a significand, the leading one among them.
template <class T>
constexpr int kSignificandBits = 24;
template <>
inline constexpr int kSignificandBits<double> = 53;
template <>
inline constexpr int kSignificandBits<bf16> = 8;
template <>
inline constexpr int kSignificandBits<f16> = 11;

template <class To, class From>
BNEXT_HOST_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class F, class U>
BNEXT_HOST_DEVICE F widen_bf16(U bits) {
  return bits_as<F>(U(bits << 16));
}

// The upper 16 bits of the result are the rounded value, to nearest even. A NaN must end in 16 zeros, or it
// may not stay one; arithmetic on bfloat16 and on NaNs that do gives no others.
template <class U, class F>
BNEXT_HOST_DEVICE U round_bf16(F value) {
  const U bits = bits_as<U>(value);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// Every NaN becomes the quiet one.
template <class U, class F>
BNEXT_HOST_DEVICE U narrow_bf16(F value) {
  const U rounded = round_bf16<U>(value) >> 16;
  const U quiet = rounded * 0u + 0x7fc0u;
  return value != value ? quiet : rounded;
}

template <class F, class U>
BNEXT_HOST_DEVICE F widen_f16(U bits) {
  const U shifted = (bits & 0x7fffu) << 13;
  const U exponent = shifted & (0x7c00u << 13);
  const U normal = shifted + (112u << 23);
  const U special = normal + (112u << 23);    // inf, NaN
  const U lifted = normal + (1u << 23);       // 2^-14 + subnormal
  const U unit = lifted * 0u + (113u << 23);  // 2^-14
  const U subnormal = bits_as<U>(F(bits_as<F>(lifted) - bits_as<F>(unit)));
  const U magnitude = exponent == (0x7c00u << 13) ? special : (exponent == 0u ? subnormal : normal);
  return bits_as<F>(U(magnitude | ((bits & 0x8000u) << 16)));
}

// Round to nearest even, overflow to infinity.
template <class U, class F>
BNEXT_HOST_DEVICE U narrow_f16(F value) {
  const U bits = bits_as<U>(value);
  const U sign = bits & 0x80000000u;
  const U magnitude = bits ^ sign;
  const U normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;  // exponent - 112, then round
  const U half = magnitude * 0u + (126u << 23);  // 0.5: ulp is the f16 subnormal step
  const U subnormal = bits_as<U>(F(bits_as<F>(magnitude) + bits_as<F>(half))) - half;
  const U infinite = magnitude * 0u + 0x7c00u;
  const U special = magnitude > 0x7f800000u ? infinite + 0x0200u : infinite;
  const U finite = magnitude < (113u << 23) ? subnormal : normal;
  return (magnitude >= (143u << 23) ? special : finite) | (sign >> 16);
}

// One value, to and from double.
BNEXT_HOST_DEVICE double widen(float value) { return value; }
BNEXT_HOST_DEVICE double widen(double value) { return value; }
BNEXT_HOST_DEVICE double widen(bf16 value) { return widen_bf16<float>(uint32_t{value.bits}); }
BNEXT_HOST_DEVICE double widen(f16 value) { return widen_f16<float>(uint32_t{value.bits}); }

BNEXT_HOST_DEVICE void narrow(double value, float& out) { out = static_cast<float>(value); }
BNEXT_HOST_DEVICE void narrow(double value, double& out) { out = value; }
BNEXT_HOST_DEVICE void narrow(double value, bf16& out) {
  out.bits = static_cast<uint16_t>(narrow_bf16<uint32_t>(static_cast<float>(value)));
}
BNEXT_HOST_DEVICE void narrow(double value, f16& out) {
  out.bits = static_cast<uint16_t>(narrow_f16<uint32_t>(static_cast<float>(value)));
}

}  // namespace bnext

// Elementary functions of a native vector: float by polynomials, double lane by lane from the C library.
//
// Included once per instruction set, after vector.h. NaN, infinities, overflow, gradual underflow and the
// sign of zero as in the C library. Greatest error over every seventh float, with and without fused
// multiply-add: exp 1.03 ulp, expm1 1.65 ulp, log1p 0.96 ulp, erf 1.3 ulp, tanh 2.6 ulp.
//
// Coefficients: weighted minimax fits (Lawson's iteration on 1500 Chebyshev nodes, values of 40 digits), then
// rounded to float from the lowest order up, the others fitted again after each. The errors noted are those
// of the rounded polynomials.

struct VectorElementary {
  using F = Native<float>;
  using I = Native<int32_t>;
  using D = Native<double>;

  template <class V>
  BNEXT_INLINE static V not_below(const V& v, const V& low) {
    return v < low ? low : v;
  }
  // The maximum gives its second operand where one is NaN or both are zeros.
#if BNEXT_VECTOR_BYTES == 64
  BNEXT_INLINE static F not_below(const F& v, const F& low) {
    return (F)_mm512_max_ps((__m512)low, (__m512)v);
  }
#elif BNEXT_VECTOR_BYTES == 32
  BNEXT_INLINE static F not_below(const F& v, const F& low) {
    return (F)_mm256_max_ps((__m256)low, (__m256)v);
  }
#endif

  BNEXT_INLINE static F exp(const F& x) {
    const Reduced a = reduce(clamp(x, -104.0f, 89.0f));
    const I half = a.n >> 1;  // n is in [-150, 128]: 2^n need not be a float, nor a normal one
    return (expm1_reduced(a.r) + 1.0f) * power_of_two(half) * power_of_two(a.n - half);
  }

  // 2^n expm1(r) + (2^n - 1), as twice its half because 2^128 is no float.
  BNEXT_INLINE static F expm1(const F& x) {
    const Reduced a = reduce(clamp(x, -18.0f, 89.0f));  // expm1(-18) rounds to -1
    const F q = expm1_reduced(a.r);
    const F half_power = power_of_two(a.n - 1);
    const F scaled = 2.0f * (half_power * q + (half_power - 0.5f));
    return with_sign_of(x, a.n == 0 ? q : scaled);  // q: a denormal cannot be halved; the sign: -0
  }

  BNEXT_INLINE static F erf(const F& x) {
    const F square = x * x;  // below 1: erf(x)/x - 1, relative error of erf 1.5e-9
    F p = square * 7.80690316e-05f - 7.9978531e-04f;
    p = p * square + 5.1871622e-03f;
    p = p * square - 2.68533472e-02f;
    p = p * square + 1.12835787e-01f;
    p = p * square - 3.7612626e-01f;
    p = p * square + 1.28379166e-01f;
    const F near = x * p + x;

    const F magnitude = absolute(x);           // above 1: -log(erfc), absolute error of erf 1.1e-9
    const F t = clamp(magnitude, 1.0f, 4.0f);  // erf(4) rounds to 1
    F g = t * -1.85580502e-04f + 2.93964241e-03f;
    g = g * t - 2.18053851e-02f;
    g = g * t + 1.03037417e-01f;
    g = g * t + 6.38225675e-01f;
    g = g * t + 1.12704003f;
    g = g * t + 3.53719515e-04f;
    const Reduced a = reduce(-g);
    const F erfc = (expm1_reduced(a.r) + 1.0f) * power_of_two(a.n);
    return magnitude < 1.0f ? near : with_sign_of(x, 1.0f - erfc);
  }

  // By e = expm1(2|x|): e / (e + 2), which above 1 is better taken as 1 - 2 / (e + 2).
  BNEXT_INLINE static F tanh(const F& x) {
    const F magnitude = absolute(x);
    const F e = expm1(2.0f * magnitude);
    const F quotient = (magnitude < 1.0f ? e : F{} - 2.0f) / (e + 2.0f);
    return with_sign_of(x, magnitude < 1.0f ? quotient : quotient + 1.0f);
  }

  // x from -1 to 1e30, or NaN. 1 + x = 2^n m, m within a factor sqrt(2) of 1: log(m) = r - r^2/2 + r^3 p(r)
  // of r = m - 1, relative error 5.9e-9; what 1 + x was rounded by comes in at the end.
  BNEXT_INLINE static F log1p(const F& x) {
    const F u = x + 1.0f;
    const I bits = bits_as<I>(u);
    const I n = (bits - 0x3f3504f3) >> 23;  // sqrt(1/2)
    const F rounding = u == 0.0f ? F{} : (x - (u - 1.0f)) / u;
    const F r = n == 0 ? x : bits_as<F>(I(bits - (n << 23))) - 1.0f;
    const F power = __builtin_convertvector(n, F);
    F p = r * -7.636439e-02f + 1.2762217e-01f;
    p = p * r - 1.315961e-01f;
    p = p * r + 1.420158e-01f;
    p = p * r - 1.6623409e-01f;
    p = p * r + 2.0001242e-01f;
    p = p * r - 2.500082e-01f;
    p = p * r + 3.333333e-01f;
    const F rest = power * -2.12194440e-4f + (n == 0 ? F{} : rounding);  // of ln(2), as in reduce
    const F log = power * 0.693359375f + (r + (r * r * (r * p - 0.5f) + rest));
    return with_sign_of(x, u == 0.0f ? F{} - __builtin_inff() : log);
  }

  BNEXT_INLINE static D exp(const D& x) {
    return each_lane(x, [](double v) __attribute__((always_inline)) { return __builtin_exp(v); });
  }
  BNEXT_INLINE static D expm1(const D& x) {
    return each_lane(x, [](double v) __attribute__((always_inline)) { return __builtin_expm1(v); });
  }
  BNEXT_INLINE static D log1p(const D& x) {
    return each_lane(x, [](double v) __attribute__((always_inline)) { return __builtin_log1p(v); });
  }
  BNEXT_INLINE static D erf(const D& x) {
    return each_lane(x, [](double v) __attribute__((always_inline)) { return __builtin_erf(v); });
  }
  BNEXT_INLINE static D tanh(const D& x) {
    return each_lane(x, [](double v) __attribute__((always_inline)) { return __builtin_tanh(v); });
  }

 private:
  // x = n ln(2) + r, r within 0.3475 of 0
  struct Reduced {
    F r;
    I n;
  };

  // |x| at most 104; of a NaN r is NaN and n is anything.
  BNEXT_INLINE static Reduced reduce(const F& x) {
    const F shifter = F{} + 12582912.0f;          // 1.5 * 2^23: a sum with it is rounded to an integer
    const F shifted = x * 1.44269504f + shifter;  // 1/ln(2)
    const F n = shifted - shifter;
    const F high = x - n * 0.693359375f;     // ln(2) to 9 bits, so that the product is exact
    const F r = high - n * -2.12194440e-4f;  // the rest of ln(2)
    return {r, bits_as<I>(shifted) - bits_as<I>(shifter)};
  }

  // r + r^2 s(r), relative error 1.4e-8
  BNEXT_INLINE static F expm1_reduced(const F& r) {
    F s = r * 1.38698437e-03f + 8.36644694e-03f;
    s = s * r + 4.16674465e-02f;
    s = s * r + 1.66665450e-01f;
    s = s * r + 4.99999970e-01f;
    return r * r * s + r;
  }

  // n in [-126, 127]
  BNEXT_INLINE static F power_of_two(const I& n) { return bits_as<F>(I((n + 127) << 23)); }

  BNEXT_INLINE static F clamp(const F& x, float low, float high) {  // NaN passes
    const F above = not_below(x, F{} + low);
    return above > high ? F{} + high : above;
  }
  BNEXT_INLINE static F absolute(const F& x) { return bits_as<F>(I(bits_as<I>(x) & 0x7fffffff)); }
  // value is not negative, or has x's sign already.
  BNEXT_INLINE static F with_sign_of(const F& x, const F& value) {
    return bits_as<F>(I((bits_as<I>(x) & ~0x7fffffff) | bits_as<I>(value)));
  }

  template <class Function>
  BNEXT_INLINE static D each_lane(const D& x, Function function) {
    D result;
    for (int i = 0; i < Lanes<double>::kWidth; ++i) result[i] = function(x[i]);
    return result;
  }
};
